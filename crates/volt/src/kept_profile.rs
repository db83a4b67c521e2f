//! What Volt keeps of one image's boot profile: the records of boots that it was merged from, and whether more are wanted.

use std::sync::Arc;

use block::NodeName;
use image::BootProfile;
use serde::{Deserialize, Serialize};

use control::api::profile::{ProfileFile, ProfileOffer, RecordSummary, Recording};

/// Records after which boots are recorded no more: enough that what a single boot did by chance is outvoted.
const RECORDS_WANTED: usize = 4;

/// Records that are kept of an image: those that were wanted, and some of boots that were under way when the
/// last of these came.
const RECORDS_MAX: usize = 8;

/// What is kept of one image's boot profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeptProfile {
    pub(crate) file: Option<ProfileFile>,
    pub(crate) recording: Recording,
    records: Vec<KeptRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KeptRecord {
    node: NodeName,
    recorded_unix_ms: u64,
    file: ProfileFile,
}

/// The first boots of an image that nobody has a profile of are recorded.
impl Default for KeptProfile {
    fn default() -> KeptProfile {
        KeptProfile { file: None, recording: Recording::On, records: Vec::new() }
    }
}

/// What became of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Recorded {
    /// It is part of the profile.
    Merged,
    /// There are enough without it.
    Unneeded,
}

impl KeptProfile {
    /// Adds the record of a boot, if it is wanted or late.
    pub(crate) fn record(&mut self, node: &NodeName, record: ProfileFile, now_unix_ms: u64) -> Recorded {
        let is_late = self.recording == Recording::Off && !self.records.is_empty();
        if self.records.len() >= RECORDS_MAX || (self.recording == Recording::Off && !is_late) {
            return Recorded::Unneeded;
        }
        let image = record.0.image();
        self.records.push(KeptRecord { node: node.clone(), recorded_unix_ms: now_unix_ms, file: record });
        // Records that have nothing in common leave the profile as it was.
        if let Ok(merged) = BootProfile::merged(image, self.records.iter().map(|record| &*record.file.0)) {
            self.file = Some(ProfileFile(Arc::new(merged)));
        }
        if self.records.len() >= RECORDS_WANTED {
            self.recording = Recording::Off;
        }
        Recorded::Merged
    }

    /// Asks for fresh records. The profile stays until the first of them comes.
    pub(crate) fn record_anew(&mut self) {
        self.records.clear();
        self.recording = Recording::On;
    }

    /// Uses this profile from now on, and records no more.
    pub(crate) fn import(&mut self, file: ProfileFile) {
        *self = KeptProfile { file: Some(file), recording: Recording::Off, records: Vec::new() };
    }

    /// Forgets the profile and its records, and records no more: else the next boot would bring it back.
    pub(crate) fn clear(&mut self) {
        *self = KeptProfile { file: None, recording: Recording::Off, records: Vec::new() };
    }

    /// What nodes are told of it.
    pub(crate) fn offer(&self) -> ProfileOffer {
        ProfileOffer { file: self.file.clone(), recording: self.recording }
    }

    /// The records that the profile was merged from.
    pub(crate) fn records(&self) -> Vec<RecordSummary> {
        let summary = |record: &KeptRecord| RecordSummary {
            node: record.node.clone(),
            recorded_unix_ms: record.recorded_unix_ms,
            chunks: record.file.0.chunks().len() as u64,
        };
        self.records.iter().map(summary).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use block::{ChunkIndex, ImageId};

    use super::*;

    /// The image that all of these are of.
    pub(crate) fn image() -> ImageId {
        ImageId::of_root_page(b"root")
    }

    /// A profile of it.
    pub(crate) fn file(chunks: &[u64]) -> ProfileFile {
        let chunks = chunks.iter().copied().map(ChunkIndex).collect();
        ProfileFile(Arc::new(BootProfile::new(image(), chunks).unwrap()))
    }

    fn node() -> NodeName {
        "n".parse().unwrap()
    }

    #[test]
    fn recording_ends_with_the_wanted_records_and_late_ones_still_count() {
        let mut kept = KeptProfile::default();
        for number in 1..=RECORDS_MAX {
            assert_eq!(kept.recording == Recording::On, number <= RECORDS_WANTED, "record {number}");
            assert_eq!(kept.record(&node(), file(&[1, 2]), 0), Recorded::Merged);
        }
        let full = kept.clone();
        assert_eq!(kept.record(&node(), file(&[3]), 0), Recorded::Unneeded);
        assert_eq!(kept, full);
    }

    #[test]
    fn fresh_records_replace_the_profile_when_the_first_of_them_comes() {
        let mut kept = KeptProfile::default();
        kept.record(&node(), file(&[1, 2]), 0);
        kept.record_anew();
        assert_eq!(kept.offer(), ProfileOffer { file: Some(file(&[1, 2])), recording: Recording::On });
        kept.record(&node(), file(&[7]), 0);
        assert_eq!(kept.offer().file, Some(file(&[7])));
        assert_eq!(kept.records().len(), 1);
    }

    #[test]
    fn what_was_imported_or_cleared_is_not_changed_by_boots_that_were_under_way() {
        for (change, expected) in [
            (KeptProfile::clear as fn(&mut KeptProfile), None),
            (|kept| kept.import(file(&[9])), Some(file(&[9]))),
        ] {
            let mut kept = KeptProfile::default();
            kept.record(&node(), file(&[1, 2]), 0);
            change(&mut kept);
            assert_eq!(kept.record(&node(), file(&[5]), 0), Recorded::Unneeded);
            assert_eq!(kept.offer(), ProfileOffer { file: expected, recording: Recording::Off });
        }
    }
}
