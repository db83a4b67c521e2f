//! The media of a node's cache group: which it has, also at the next start.
//!
//! The rule: `--cache` names media, or the default does; `virtman cache add` and `cache remove` change that, and what they
//! said last counts more than `--cache`, also at the next start. A medium that was removed stays away for as long as
//! `--cache` goes on naming it; once it does not, that is forgotten, and to name it again adds it again.
//!
//! Consistency: one change at a time. Crash: the group is changed first and the record written then, so a change that was
//! answered is remembered, and one that was not may be repeated. Retries: none; a medium that cannot be opened at the
//! start is shown as failed until it is removed or added again, and the node starts without it, unless `--cache`
//! names it: then somebody just now said so, and is told.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use block::NodeName;
use block::limits::CHUNK_BYTES;
use serde::{Deserialize, Serialize};
use store::{CacheError, CacheGroup, MediaSpec, MediumStatus};

use crate::config::CacheMedium;
use crate::state::{self, Layout};
use control::api::compute::{AddMedium, MediumState, MediumView, RemoveMedium};
use control::refusal::{Code, Refusal};

/// Size of the cache if none was given, in bytes. The file is sparse: it takes what is cached.
const CACHE_BYTES_DEFAULT: u64 = 10 << 30;

/// How long a removal waits for reads of the medium that are on their way. A disk that hangs may hold them up for
/// ever; the medium is then listed as leaving until it lets go of them.
const LEAVE_TIME_MAX: Duration = Duration::from_secs(10);

/// The cache group of a node and what is remembered of its media.
pub(crate) struct CacheMedia {
    node: NodeName,
    group: Arc<CacheGroup>,
    record: PathBuf,
    configured: Vec<MediaSpec>,
    /// What was said while the node ran. Held during a change.
    said: tokio::sync::Mutex<Said>,
    /// Media that could not be opened at the start, and why.
    refused: Mutex<BTreeMap<PathBuf, Refused>>,
}

/// A medium that could not be opened.
struct Refused {
    size_bytes: u64,
    reason: String,
}

/// What `cache add` and `cache remove` said, as far as it differs from `--cache`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Said {
    media: Vec<SaidMedium>,
}

/// What was said last of one medium.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SaidMedium {
    path: PathBuf,
    /// The size that it was added with; none if it was removed.
    size_bytes: Option<u64>,
}

impl Said {
    /// What was said of a medium.
    fn of(&self, path: &Path) -> Option<&SaidMedium> {
        self.media.iter().find(|medium| medium.path == path)
    }

    /// The same with a medium added, or removed.
    fn with(&self, path: &Path, size_bytes: Option<u64>, configured: &[MediaSpec]) -> Said {
        let mut media = self.media.clone();
        media.retain(|medium| medium.path != path);
        let of_config = configured.iter().find(|spec| spec.path == path).map(|spec| spec.size_bytes);
        if size_bytes != of_config {
            media.push(SaidMedium { path: path.to_owned(), size_bytes });
        }
        Said { media }
    }

    /// Without what has become pointless: the removal of media that `--cache` does not name any more.
    fn relevant(mut self, configured: &[MediaSpec]) -> Said {
        let is_configured = |path: &Path| configured.iter().any(|spec| spec.path == path);
        self.media.retain(|medium| medium.size_bytes.is_some() || is_configured(&medium.path));
        self
    }

    /// The media of the node.
    fn media(&self, configured: &[MediaSpec]) -> Vec<MediaSpec> {
        let unchanged = configured.iter().filter(|spec| self.of(&spec.path).is_none()).cloned();
        let added = self.media.iter().filter_map(|medium| {
            Some(MediaSpec { path: medium.path.clone(), size_bytes: medium.size_bytes? })
        });
        unchanged.chain(added).collect()
    }
}

impl CacheMedia {
    /// Opens the media of the node in `layout`. Blocks while their directories are read.
    pub(super) fn open(
        node: &NodeName,
        layout: &Layout,
        given: &[CacheMedium],
    ) -> Result<CacheMedia, String> {
        let configured = configured(layout, given)?;
        let record = layout.cache_record();
        let written = read_said(&record);
        let said = written.clone().relevant(&configured);
        if said != written {
            state::write_record(&record, &said)
                .map_err(|e| format!("cannot write {}: {e}", record.display()))?;
        }
        let (group, refused) = CacheGroup::open_usable(&said.media(&configured));
        let mut kept = BTreeMap::new();
        for (spec, error) in refused {
            if said.of(&spec.path).is_none() {
                return Err(format!("{error}; mend that, or name other media with --cache"));
            }
            let medium = spec.name();
            tracing::error!(medium, %error, "medium_unusable: remove it, or add it again");
            kept.insert(spec.path, Refused { size_bytes: spec.size_bytes, reason: error.to_string() });
        }
        Ok(CacheMedia {
            node: node.clone(),
            group,
            record,
            configured,
            said: tokio::sync::Mutex::new(said),
            refused: Mutex::new(kept),
        })
    }

    /// The cache group.
    pub(crate) fn group(&self) -> &Arc<CacheGroup> {
        &self.group
    }

    /// All media, in the order of their paths.
    pub(crate) fn list(&self) -> Vec<MediumView> {
        let refused = self.refused();
        let refused = refused.iter().map(|(path, refused)| MediumView {
            node: self.node.clone(),
            path: path.display().to_string(),
            size_bytes: refused.size_bytes,
            capacity_bytes: 0,
            resident_bytes: 0,
            resident_chunks: 0,
            state: MediumState::Failed,
            failures: 0,
            reason: Some(refused.reason.clone()),
        });
        let mut all: Vec<MediumView> =
            self.group.media().into_iter().map(|medium| self.view(medium)).chain(refused).collect();
        all.sort_by(|a, b| a.path.cmp(&b.path));
        all
    }

    /// How many media failed, or could not be opened.
    pub(crate) fn failed_media(&self) -> u64 {
        self.group.stats().failed_media + self.refused().len() as u64
    }

    /// Adds a medium. Repeating it changes nothing.
    pub(crate) async fn add(&self, request: &AddMedium) -> Result<MediumView, Refusal> {
        let path = absolute(&request.path)?;
        let mut said = self.said.lock().await;
        let spec = MediaSpec { path: path.clone(), size_bytes: request.size_bytes };
        let name = spec.name();
        self.group.add(spec).await.map_err(|error| self.refusal(&error))?;
        self.refused().remove(&path);
        self.remember(&mut said, &path, Some(request.size_bytes), "in use")?;
        tracing::info!(medium = name, "medium_added");
        self.find(&name)
            .ok_or_else(|| Refusal::internal(format!("cache medium '{name}' is there and cannot be found")))
    }

    /// Removes a medium; its file stays. Answers with the medium if reads of it are still on their way.
    pub(crate) async fn remove(&self, request: &RemoveMedium) -> Result<Option<MediumView>, Refusal> {
        let path = absolute(&request.path)?;
        let name = path.display().to_string();
        let mut said = self.said.lock().await;
        let was_refused = self.refused().remove(&path).is_some();
        // A removal that was made and could not be remembered can be repeated.
        let is_remembered = self.planned(&said).iter().any(|spec| spec.path == path);
        let is_leaving = match tokio::time::timeout(LEAVE_TIME_MAX, self.group.remove(&name)).await {
            Err(_) => true,
            Ok(Ok(())) => false,
            Ok(Err(CacheError::Unknown(_))) if was_refused || is_remembered => false,
            Ok(Err(error)) => return Err(self.refusal(&error)),
        };
        self.remember(&mut said, &path, None, "not in use any more")?;
        tracing::info!(medium = name, "medium_removed");
        Ok(if is_leaving { self.find(&name) } else { None })
    }

    fn planned(&self, said: &Said) -> Vec<MediaSpec> {
        said.media(&self.configured)
    }

    /// Has the next start know what was done.
    fn remember(
        &self,
        said: &mut Said,
        path: &Path,
        size_bytes: Option<u64>,
        done: &str,
    ) -> Result<(), Refusal> {
        let new = said.with(path, size_bytes, &self.configured);
        if new == *said {
            return Ok(());
        }
        state::write_record(&self.record, &new).map_err(|error| {
            Refusal::internal(format!(
                "cache medium '{}' is {done}, but the next start will not know: cannot write {}: {error}",
                path.display(),
                self.record.display()
            ))
            .with_hint("mend that and repeat the command")
        })?;
        *said = new;
        Ok(())
    }

    fn find(&self, name: &str) -> Option<MediumView> {
        self.list().into_iter().find(|medium| medium.path == name)
    }

    fn view(&self, medium: MediumStatus) -> MediumView {
        let chunk_bytes = CHUNK_BYTES as u64;
        MediumView {
            node: self.node.clone(),
            path: medium.name,
            size_bytes: medium.size_bytes,
            capacity_bytes: medium.slots * chunk_bytes,
            resident_bytes: medium.resident_chunks * chunk_bytes,
            resident_chunks: medium.resident_chunks,
            state: match medium.state {
                store::MediumState::Healthy => MediumState::Healthy,
                store::MediumState::Failed => MediumState::Failed,
                store::MediumState::Leaving => MediumState::Leaving,
            },
            failures: medium.failures,
            reason: medium.reason,
        }
    }

    fn refused(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Refused>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the cache group's refusal means to somebody who asked this node.
    fn refusal(&self, error: &CacheError) -> Refusal {
        let message = error.to_string();
        match error {
            CacheError::Unusable(_) | CacheError::Io { .. } => {
                Refusal::new(Code::BadMedium, message).with_hint(
                    "name a file in a directory that is there, or a block device, and a size, such as /srv/chunks=50G",
                )
            }
            CacheError::InUse(_) => Refusal::new(Code::MediumInUse, message)
                .with_hint("use another file, or end what uses it"),
            CacheError::Foreign(_) => Refusal::new(Code::ForeignMedium, message),
            CacheError::Taken(_) => Refusal::new(Code::MediumExists, message)
                .with_hint("'virtman cache remove PATH' removes it"),
            CacheError::Last(_) => Refusal::new(Code::LastMedium, message)
                .with_hint("'virtman cache add PATH=SIZE' does that"),
            CacheError::Unknown(_) => {
                Refusal::new(Code::NoSuchMedium, format!("{message} on node {}", self.node))
                    .with_hint("'virtman cache list' shows those that there are")
            }
        }
    }
}

/// The media that `--cache` names, or the default.
fn configured(layout: &Layout, given: &[CacheMedium]) -> Result<Vec<MediaSpec>, String> {
    let named = |medium: &CacheMedium| {
        let path = std::path::absolute(&medium.path)
            .map_err(|e| format!("--cache {}: {e}", medium.path.display()))?;
        Ok(MediaSpec { path, size_bytes: medium.size_bytes })
    };
    if !given.is_empty() {
        return given.iter().map(named).collect();
    }
    let dir = layout.cache();
    fs::create_dir_all(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    Ok(vec![MediaSpec { path: dir.join("chunks"), size_bytes: CACHE_BYTES_DEFAULT }])
}

/// What was said before. A damaged record costs what it said, and is written anew with the next change.
fn read_said(record: &Path) -> Said {
    if !record.exists() {
        return Said::default();
    }
    state::read_record(record).unwrap_or_else(|reason| {
        tracing::error!(reason, "media_record_damaged: the node uses the media of --cache");
        Said::default()
    })
}

fn absolute(path: &Path) -> Result<PathBuf, Refusal> {
    if !path.is_absolute() {
        let message = format!("'{}' is not an absolute path", path.display());
        return Err(Refusal::new(Code::NotAbsolute, message)
            .with_hint("say where on the node it is, such as /srv/chunks"));
    }
    std::path::absolute(path).map_err(|e| Refusal::new(Code::BadPath, e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(path: &str, size_bytes: u64) -> MediaSpec {
        MediaSpec { path: path.into(), size_bytes }
    }

    #[test]
    fn what_was_said_last_counts_more_than_the_options() {
        let options = [spec("/a", 1), spec("/b", 2)];
        let said = Said::default();
        assert_eq!(said.media(&options), options);
        let said = said.with(Path::new("/a"), None, &options).with(Path::new("/c"), Some(3), &options);
        assert_eq!(said.media(&options), [spec("/b", 2), spec("/c", 3)]);
        let said = said.with(Path::new("/a"), Some(9), &options);
        assert_eq!(said.media(&options), [spec("/b", 2), spec("/c", 3), spec("/a", 9)]);
    }

    #[test]
    fn what_agrees_with_the_options_is_not_kept() {
        let options = [spec("/a", 1)];
        let path = Path::new("/a");
        let said = Said::default().with(path, None, &options);
        assert_ne!(said, Said::default());
        assert_eq!(said.with(path, Some(1), &options), Said::default());
        let said = Said::default().with(Path::new("/c"), Some(3), &options);
        assert_eq!(said.with(Path::new("/c"), None, &options), Said::default());
    }

    #[test]
    fn a_removal_is_forgotten_when_the_options_name_the_medium_no_more() {
        let options = [spec("/a", 1)];
        let said =
            Said::default().with(Path::new("/a"), None, &options).with(Path::new("/c"), Some(3), &options);
        assert_eq!(said.clone().relevant(&options), said);
        let without = said.relevant(&[]);
        assert_eq!(without.media(&options), [spec("/a", 1), spec("/c", 3)]);
    }
}
