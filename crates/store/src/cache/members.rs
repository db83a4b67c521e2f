//! Media that come and go while chunks are read.
//!
//! Consistency: one change at a time. A medium that comes is known to all parts of the index before any of its slots is
//! entered; one that goes is marked first, so that nobody begins to use it, then all parts forget its slots, and only
//! then is it taken out of the set (see [`set`](super::set)). Whoever uses it meanwhile holds it, and finishes: what he
//! reads is right, or he notices that the slot was emptied and fetches. Chunks on their way to it are answered and not
//! stored.
//! Cancellation: a change that was begun is made on the blocking pool to its end, whoever waits for it or not.
//! Crash: nothing of this is remembered here; whoever opens the group says which media it has.
//! What is on a medium that was removed stays there: added again it has its chunks again.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::watch;

use super::health::MediumState;
use super::medium::{Layout, Medium, Terms};
use super::set::{MediumSet, SlotId};
use super::{CacheError, CacheGroup, MEDIA_MAX};
use crate::media::{FileMedia, InUse};
use crate::{Media, asyncio};

/// How many slots are forgotten at a time, so that reads wait for a part of the index no longer than about a
/// millisecond.
const PURGE_SLOTS: usize = 4096;

/// One local medium given to a cache group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MediaSpec {
    /// A file, created if missing, or a block device. Its name in messages, and its name among the media.
    pub path: PathBuf,
    /// How many bytes of it may be used, everything counted.
    pub size_bytes: u64,
}

impl MediaSpec {
    /// The medium's name in its group.
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }
}

/// A medium as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MediumStatus {
    /// Its path, or the name that it was given.
    pub name: String,
    /// How many bytes of it may be used.
    pub size_bytes: u64,
    /// How many chunks it has room for.
    pub slots: u64,
    /// How many chunks are found on it.
    pub resident_chunks: u64,
    /// Whether it is used.
    pub state: MediumState,
    /// How many reads and writes of it failed or brought wrong bytes.
    pub failures: u32,
    /// What went wrong last; that it is full is told here too.
    pub reason: Option<String>,
}

/// What is needed to change the media.
#[derive(Default)]
pub(super) struct Members {
    /// Held while the media change.
    changing: Mutex<()>,
    /// Media that were taken out and may still be in use.
    left: Mutex<Vec<Weak<Medium>>>,
}

impl Members {
    /// The media that were taken out and are still in use.
    fn left(&self) -> Vec<Arc<Medium>> {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.retain(|medium| medium.strong_count() > 0);
        left.iter().filter_map(Weak::upgrade).collect()
    }

    fn note_left(&self, medium: &Arc<Medium>) {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(medium));
    }
}

/// A medium before it has a number: its name, how much of it may be used, and its storage.
pub(super) type Candidate = (String, u64, Arc<dyn Media>);

/// Opens the storage of a medium, for this group alone.
pub(super) fn open_file(spec: &MediaSpec) -> Result<Candidate, CacheError> {
    let name = spec.name();
    // Before a file is made that is of no use.
    Layout::must_hold_a_chunk(&name, spec.size_bytes)?;
    let failed = |source| CacheError::Io { medium: name.clone(), source };
    let file = FileMedia::open_or_create(&spec.path).map_err(failed)?;
    file.lock().map_err(failed)?.map_err(|InUse| CacheError::InUse(name.clone()))?;
    file.read_only_what_is_asked_for().map_err(failed)?;
    let size_bytes = if file.is_device() {
        spec.size_bytes.min(Media::len_bytes(&file).map_err(failed)?)
    } else {
        spec.size_bytes
    };
    Ok((name, size_bytes, Arc::new(file)))
}

/// Takes storage that is open already, up to its present length.
pub(super) fn whole(name: String, media: Arc<dyn Media>) -> Result<Candidate, CacheError> {
    match media.len_bytes() {
        Ok(size_bytes) => Ok((name, size_bytes, media)),
        Err(source) => Err(CacheError::Io { medium: name, source }),
    }
}

impl CacheGroup {
    /// Adds a medium, with the chunks that are found on it. A medium that is there with this size already is left as it
    /// is. Ends when the directory was read: 40 bytes for each 64 KiB.
    pub async fn add(self: &Arc<Self>, spec: MediaSpec) -> Result<(), CacheError> {
        let name = spec.name();
        self.change(name.clone(), move |group| group.admit(&name, spec.size_bytes, || open_file(&spec))).await
    }

    /// The same with a medium that is open already, used up to its present length.
    pub async fn add_media(self: &Arc<Self>, name: String, media: Arc<dyn Media>) -> Result<(), CacheError> {
        let candidate = whole(name.clone(), media)?;
        self.change(name.clone(), move |group| group.admit(&name, candidate.1, || Ok(candidate))).await
    }

    /// Removes a medium. From now on nothing is looked for or stored on it; what was there is fetched again when it is
    /// wanted. Ends when nobody uses the medium any more and it is closed. The last healthy medium stays.
    pub async fn remove(self: &Arc<Self>, name: &str) -> Result<(), CacheError> {
        let owned = name.to_owned();
        let mut gone = self.change(owned.clone(), move |group| group.take_out(&owned)).await?;
        // Nothing is ever sent: this ends when the medium is dropped.
        while gone.changed().await.is_ok() {}
        Ok(())
    }

    /// The media, those that are leaving last.
    pub fn media(&self) -> Vec<MediumStatus> {
        let set = self.media.load();
        set.iter().chain(&self.members.left()).map(|medium| medium.status()).collect()
    }

    async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        medium: String,
        work: impl FnOnce(&CacheGroup) -> Result<T, CacheError> + Send + 'static,
    ) -> Result<T, CacheError> {
        let group = Arc::clone(self);
        let done = asyncio::blocking(move || {
            let _one_at_a_time = group.members.changing.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(work(&group))
        });
        done.await.map_err(|source| CacheError::Io { medium, source })?
    }

    /// Opens and takes in a medium, unless it is there already.
    fn admit(
        &self,
        name: &str,
        size_bytes: u64,
        open: impl FnOnce() -> Result<Candidate, CacheError>,
    ) -> Result<(), CacheError> {
        if let Some(known) = self.medium_named(name) {
            return known.must_be_as(size_bytes);
        }
        if self.members.left().iter().any(|medium| medium.name() == name) {
            return Err(CacheError::Taken(format!(
                "cache medium '{name}' is still leaving: reads of it are on their way; try again when it is not listed any more"
            )));
        }
        self.free_number(name)?;
        self.take_in(open()?)
    }

    /// Takes in an open medium. One change at a time.
    pub(super) fn take_in(&self, (name, size_bytes, media): Candidate) -> Result<(), CacheError> {
        let number = self.free_number(&name)?;
        let medium = Arc::new(Medium::open(Terms { number, name, size_bytes }, media)?);
        self.set_media(self.media.load().with(Arc::clone(&medium)));
        self.find_chunks(&medium);
        self.set_out();
        Ok(())
    }

    /// A number for one more medium: one that neither a medium has nor one that was taken out and is still in use.
    fn free_number(&self, name: &str) -> Result<usize, CacheError> {
        let (set, left) = (self.media.load(), self.members.left());
        let taken = |number: &usize| set.iter().chain(&left).any(|medium| medium.number() == *number);
        (0..MEDIA_MAX).find(|number| !taken(number)).ok_or_else(|| {
            CacheError::Unusable(format!(
                "a cache group has at most {MEDIA_MAX} media: there is no room for '{name}'"
            ))
        })
    }

    /// Enters what a medium's directory names. A directory that cannot be read makes the rest of its
    /// medium empty.
    fn find_chunks(&self, medium: &Medium) {
        let slots = medium.slots().len() as u32;
        let mut visited = 0;
        let read = medium.read_directory(|index, hash| {
            visited = index + 1;
            let id = SlotId::new(medium.number(), index);
            let is_entered = hash.is_some_and(|hash| self.shard(&hash).lock().add_found(id, &hash));
            if !is_entered {
                self.add_free(id);
            }
        });
        if let Err(error) = read {
            medium.note_error(&error);
            (visited..slots).for_each(|index| self.add_free(SlotId::new(medium.number(), index)));
        }
    }

    fn add_free(&self, id: SlotId) {
        // Any shard may have any slot; in turn, each gets the same number.
        self.shards[id.index() as usize % self.shards.len()].lock().add_free(id);
    }

    /// Takes a medium out, and says when it is closed. One change at a time.
    fn take_out(&self, name: &str) -> Result<watch::Receiver<()>, CacheError> {
        let Some(medium) = self.medium_named(name) else {
            let leaving = self.members.left().into_iter().find(|medium| medium.name() == name);
            return leaving.map(|medium| medium.gone()).ok_or_else(|| CacheError::Unknown(name.to_owned()));
        };
        let is_other = |other: &&Arc<Medium>| other.is_usable() && !Arc::ptr_eq(other, &medium);
        if medium.is_usable() && self.media.load().iter().find(is_other).is_none() {
            return Err(CacheError::Last(name.to_owned()));
        }
        medium.health.leave();
        for shard in &self.shards {
            while shard.lock().purge(medium.number(), PURGE_SLOTS) == PURGE_SLOTS {}
        }
        self.members.note_left(&medium);
        self.set_media(self.media.load().without(medium.number()));
        self.set_out();
        Ok(medium.gone())
    }

    fn medium_named(&self, name: &str) -> Option<Arc<Medium>> {
        self.media.load().iter().find(|medium| medium.name() == name).cloned()
    }

    /// Makes a set the one that counts: first for the index, which alone gives out slots.
    fn set_media(&self, set: MediumSet) {
        let set = Arc::new(set);
        for shard in &self.shards {
            shard.lock().set_media(Arc::clone(&set));
        }
        self.media.store(set);
    }

    fn set_out(&self) {
        for shard in &self.shards {
            shard.lock().set_out();
        }
    }
}

impl Medium {
    /// What adding a medium again with this size comes to.
    fn must_be_as(&self, size_bytes: u64) -> Result<(), CacheError> {
        let name = self.name();
        if !self.is_usable() {
            return Err(CacheError::Taken(format!(
                "cache medium '{name}' has failed: remove it first, then add it again"
            )));
        }
        if self.size_bytes() != size_bytes {
            return Err(CacheError::Taken(format!(
                "cache medium '{name}' is there already, with {} bytes and not {size_bytes}: remove it first to add it with another size",
                self.size_bytes()
            )));
        }
        Ok(())
    }

    fn status(&self) -> MediumStatus {
        let state = self.health.state();
        MediumStatus {
            name: self.name().to_owned(),
            size_bytes: self.size_bytes(),
            slots: self.slots().len() as u64,
            // What a medium still names that is not used any more is not found.
            resident_chunks: if state == MediumState::Healthy { self.resident() } else { 0 },
            state,
            failures: self.health.failures(),
            reason: self.health.reason(),
        }
    }
}
