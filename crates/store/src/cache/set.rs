//! The media of a group at one moment, and how slots are numbered.
//!
//! A [`MediumSet`] never changes; when a medium comes or goes there is a new one. Each part of the index has the set
//! that its numbers are meant in, under its lock. Who comes with a hint looks it up in the newest set, without a lock.
//!
//! A medium's number is given to another only after every part of the index has forgotten all slots of the first, and
//! when nobody holds the first any more. So in the index a number means one slot. A hint, which is kept outside of it,
//! may outlive that and then name a slot of another medium. That does no harm: a hint says only where to look first,
//! and slot, name and bytes are looked at in one and the same medium.

use std::sync::Arc;

use super::MEDIA_MAX;
use super::medium::Medium;
use super::slot::Slot;

/// A slot of the group: the medium's number in the upper four bits, the slot's below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SlotId(pub(super) u32);

impl SlotId {
    pub(super) fn new(medium: usize, index: u32) -> SlotId {
        SlotId((medium as u32) << 28 | index)
    }

    pub(super) fn medium(self) -> usize {
        (self.0 >> 28) as usize
    }

    pub(super) fn index(self) -> u32 {
        self.0 & ((1 << 28) - 1)
    }

    /// The slot as a note for the next read. Never 0.
    pub(super) fn to_hint(self) -> u64 {
        u64::from(self.0) + 1
    }

    pub(super) fn from_hint(hint: u64) -> Option<SlotId> {
        u32::try_from(hint.checked_sub(1)?).ok().map(SlotId)
    }
}

/// The media of a group, each at its number.
#[derive(Clone, Default)]
pub(super) struct MediumSet([Option<Arc<Medium>>; MEDIA_MAX]);

impl MediumSet {
    /// The medium of a slot in the index.
    pub(super) fn medium(&self, id: SlotId) -> &Arc<Medium> {
        self.0[id.medium()].as_ref().expect("the index names only slots of media in its set")
    }

    /// A slot in the index.
    pub(super) fn slot(&self, id: SlotId) -> &Slot {
        self.medium(id).slot(id)
    }

    /// The medium and slot, if a number from outside names one.
    pub(super) fn get(&self, id: SlotId) -> Option<(&Medium, &Slot)> {
        let medium = self.0[id.medium()].as_deref()?;
        Some((medium, medium.slots().get(id.index() as usize)?))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Medium>> {
        self.0.iter().flatten()
    }

    /// A set that has this medium too.
    pub(super) fn with(&self, medium: Arc<Medium>) -> MediumSet {
        let mut set = self.clone();
        let number = medium.number();
        set.0[number] = Some(medium);
        set
    }

    /// A set without the medium of this number.
    pub(super) fn without(&self, number: usize) -> MediumSet {
        let mut set = self.clone();
        set.0[number] = None;
        set
    }
}
