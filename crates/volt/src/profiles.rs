//! The images' boot profiles: kept beside the catalog, merged from the records of first boots, and handed out.
//!
//! The boots of an image's VMs are recorded until there are [`RECORDS_WANTED`] records; each record that comes makes
//! a new merged profile, and the nodes that have the image attached are told. An administrator may ask for fresh
//! records, take a profile over from a file, or clear it.
//!
//! Consistency: changes are one at a time, and are told in the order in which they were made. Durability: a change
//! is on disk before anybody is told. What is handed out is kept in memory too, since every attach asks for it.

pub(crate) mod routes;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use block::{ImageId, NodeName};
use image::BootProfile;
use serde::{Deserialize, Serialize};

use super::catalog::{Catalog, CatalogError};
use control::api::profile::{ProfileFile, ProfileOffer, RecordSummary, Recording};

/// Records after which boots are recorded no more: enough that what a single boot did by chance is outvoted.
const RECORDS_WANTED: usize = 4;

/// Records that are kept of an image: those that were wanted, and some of boots that were under way when the
/// last of these came.
const RECORDS_MAX: usize = 8;

/// What is kept of one image's boot profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeptProfile {
    file: Option<ProfileFile>,
    recording: Recording,
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
    fn record(&mut self, node: &NodeName, record: ProfileFile, now_unix_ms: u64) -> Recorded {
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
    fn record_anew(&mut self) {
        self.records.clear();
        self.recording = Recording::On;
    }

    /// Uses this profile from now on, and records no more.
    fn import(&mut self, file: ProfileFile) {
        *self = KeptProfile { file: Some(file), recording: Recording::Off, records: Vec::new() };
    }

    /// Forgets the profile and its records, and records no more: else the next boot would bring it back.
    fn clear(&mut self) {
        *self = KeptProfile { file: None, recording: Recording::Off, records: Vec::new() };
    }

    fn offer(&self) -> ProfileOffer {
        ProfileOffer { file: self.file.clone(), recording: self.recording }
    }

    /// The records that the profile was merged from.
    fn records(&self) -> Vec<RecordSummary> {
        let summary = |record: &KeptRecord| RecordSummary {
            node: record.node.clone(),
            recorded_unix_ms: record.recorded_unix_ms,
            chunks: record.file.0.chunks().len() as u64,
        };
        self.records.iter().map(summary).collect()
    }
}

/// The boot profiles of all images.
pub(crate) struct Profiles {
    catalog: Arc<Catalog>,
    offers: RwLock<HashMap<ImageId, ProfileOffer>>,
    /// Held while a profile is changed and told.
    changing: Mutex<()>,
}

impl Profiles {
    /// Reads what is kept.
    pub(crate) fn open(catalog: Arc<Catalog>) -> Result<Profiles, CatalogError> {
        let offers = catalog.profiles()?.into_iter().map(|(image, kept)| (image, kept.offer())).collect();
        Ok(Profiles { catalog, offers: RwLock::new(offers), changing: Mutex::new(()) })
    }

    /// What a node that attaches the image is told.
    pub(crate) fn offer(&self, image: &ImageId) -> ProfileOffer {
        let offers = self.offers.read().unwrap_or_else(PoisonError::into_inner);
        offers.get(image).cloned().unwrap_or_else(|| KeptProfile::default().offer())
    }

    /// All that is kept of an image's profile.
    pub(crate) fn kept(&self, image: &ImageId) -> Result<KeptProfile, CatalogError> {
        Ok(self.catalog.profile(image)?.unwrap_or_default())
    }

    /// Changes an image's profile, and calls `tell` if nodes have to know.
    fn change<T>(
        &self,
        image: &ImageId,
        change: impl FnOnce(&mut KeptProfile) -> T,
        tell: impl FnOnce(ProfileOffer),
    ) -> Result<T, CatalogError> {
        let _one_at_a_time = self.changing();
        let mut kept = self.kept(image)?;
        let old = kept.clone();
        let changed = change(&mut kept);
        if kept != old {
            self.catalog.keep_profile(image, &kept)?;
            let offer = kept.offer();
            if offer != old.offer() {
                self.offers.write().unwrap_or_else(PoisonError::into_inner).insert(*image, offer.clone());
                tell(offer);
            }
        }
        Ok(changed)
    }

    /// Forgets the profile of an image that has no name any more.
    pub(crate) fn forget(&self, image: &ImageId) -> Result<(), CatalogError> {
        let _one_at_a_time = self.changing();
        self.catalog.forget_profile(image)?;
        self.offers.write().unwrap_or_else(PoisonError::into_inner).remove(image);
        Ok(())
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use block::ChunkIndex;

    use super::*;

    fn image() -> ImageId {
        ImageId::of_root_page(b"root")
    }

    fn file(chunks: &[u64]) -> ProfileFile {
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

    #[test]
    fn nodes_are_told_of_each_change_once_and_all_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("catalog.redb");
        let open = || Profiles::open(Arc::new(Catalog::open(&catalog).unwrap())).unwrap();
        let mut told = Vec::new();
        let profiles = open();
        assert_eq!(profiles.offer(&image()), ProfileOffer { file: None, recording: Recording::On });
        for _ in 0..2 {
            profiles.change(&image(), |kept| kept.import(file(&[4])), |offer| told.push(offer)).unwrap();
        }
        let offer = ProfileOffer { file: Some(file(&[4])), recording: Recording::Off };
        assert_eq!(told, std::slice::from_ref(&offer));
        drop(profiles);

        let profiles = open();
        assert_eq!(profiles.offer(&image()), offer);
        profiles.forget(&image()).unwrap();
        assert_eq!(profiles.kept(&image()).unwrap(), KeptProfile::default());
        assert_eq!(profiles.offer(&image()), KeptProfile::default().offer());
    }
}
