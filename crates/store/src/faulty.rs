//! A medium that fails as real ones do, from a seed: for tests and simulation.
//!
//! What was written and not synced is remembered per *tear unit* (a sector or a page) with all versions
//! that it had since the last sync. At a power cut each unit keeps one of these versions, chosen from the
//! seed and independently of all others: the medium may write back in any order, in part, or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::TryIo;

use crate::Media;
use crate::media::SparseBytes;

/// The smallest unit that a medium writes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TearUnit {
    /// 512 bytes, as old disks do.
    Sector,
    /// 4 KiB, as the page cache and current disks do.
    Page,
}

impl TearUnit {
    fn bytes(self) -> u64 {
        match self {
            TearUnit::Sector => 512,
            TearUnit::Page => 4096,
        }
    }
}

/// Shared memory that behaves as a medium with faults. Clones share the same bytes.
#[derive(Debug, Clone)]
pub struct FaultyMedia {
    shared: Arc<Mutex<Shared>>,
    /// Handles from before a power cut are dead: what still runs then must not reach the medium.
    boot: u64,
}

#[derive(Debug)]
struct Shared {
    now: SparseBytes,
    durable: SparseBytes,
    /// All unsynced versions of each unit, the current one last.
    unsynced: BTreeMap<u64, Vec<Box<[u8]>>>,
    unit: TearUnit,
    boot: u64,
    random: SplitMix,
    operations_left: Option<u64>,
    room_bytes: Option<u64>,
    syncs: Syncs,
    try_reads: TryReads,
    /// Units that are not in memory, so that they cannot be read without waiting.
    forgotten: BTreeSet<u64>,
    sync_count: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Syncs {
    Work,
    Fail,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TryReads {
    Often,
    Never,
}

/// SplitMix64: enough randomness for faults, without a dependency.
#[derive(Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

impl FaultyMedia {
    /// An empty medium without faults but those at a power cut.
    pub fn new(seed: u64, unit: TearUnit) -> FaultyMedia {
        let shared = Shared {
            now: SparseBytes::default(),
            durable: SparseBytes::default(),
            unsynced: BTreeMap::new(),
            unit,
            boot: 0,
            random: SplitMix(seed),
            operations_left: None,
            room_bytes: None,
            syncs: Syncs::Work,
            try_reads: TryReads::Often,
            forgotten: BTreeSet::new(),
            sync_count: 0,
        };
        FaultyMedia { shared: Arc::new(Mutex::new(shared)), boot: 0 }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the power: unsynced units keep any one of their versions, all older handles fail from now
    /// on, and all faults that were set are off. Returns the medium as it is found afterwards.
    pub fn power_cut(&self) -> FaultyMedia {
        let mut shared = self.lock();
        let shared = &mut *shared;
        let unit = shared.unit.bytes();
        for (index, versions) in std::mem::take(&mut shared.unsynced) {
            let choice = shared.random.below(versions.len() as u64 + 1);
            if let Some(version) = versions.get(choice as usize) {
                shared.durable.write(index * unit, version);
            }
        }
        let len = shared.now.len();
        shared.durable.set_len(len);
        shared.now = shared.durable.clone();
        self.restart(shared)
    }

    /// Ends the process but not the machine: everything written stays, all older handles fail.
    pub fn kill(&self) -> FaultyMedia {
        self.restart(&mut self.lock())
    }

    fn restart(&self, shared: &mut Shared) -> FaultyMedia {
        shared.boot += 1;
        shared.operations_left = None;
        shared.room_bytes = None;
        shared.syncs = Syncs::Work;
        FaultyMedia { shared: Arc::clone(&self.shared), boot: shared.boot }
    }

    /// The operations after the next `count` fail.
    pub fn fail_after(&self, count: u64) {
        self.lock().operations_left = Some(count);
    }

    /// From now on operations succeed again, and there is room.
    pub fn repair(&self) {
        let mut shared = self.lock();
        shared.operations_left = None;
        shared.room_bytes = None;
    }

    /// After `bytes` more bytes were written there is no space left; `None` gives room again.
    pub fn set_room_bytes(&self, bytes: Option<u64>) {
        self.lock().room_bytes = bytes;
    }

    /// From now on every sync fails, and makes nothing durable.
    pub fn fail_syncs(&self) {
        self.lock().syncs = Syncs::Fail;
    }

    /// From now on no read is served on the spot.
    pub fn make_reads_wait(&self) {
        self.lock().try_reads = TryReads::Never;
    }

    /// Flips one bit of the byte at `offset`, durably.
    pub fn flip_bit(&self, offset: u64, bit: u8) {
        self.lock().flip_bit(offset, bit);
    }

    /// Flips one bit of the byte at `offset` on the device, while memory holds nothing of it: the next read of it
    /// has to wait, and finds it wrong.
    pub fn rot_bit(&self, offset: u64, bit: u8) {
        let mut shared = self.lock();
        shared.flip_bit(offset, bit);
        let unit = shared.unit.bytes();
        shared.forgotten.insert(offset / unit);
    }

    /// How many syncs succeeded.
    pub fn sync_count(&self) -> u64 {
        self.lock().sync_count
    }

    /// The medium, if this handle is alive and the countdown has not run out.
    fn operate(&self) -> io::Result<MutexGuard<'_, Shared>> {
        let mut shared = self.lock();
        if shared.boot != self.boot {
            return Err(io::Error::other("the power of this medium was cut"));
        }
        if let Some(left) = &mut shared.operations_left {
            if *left == 0 {
                return Err(io::Error::other("this medium is broken"));
            }
            *left -= 1;
        }
        Ok(shared)
    }
}

impl Shared {
    fn flip_bit(&mut self, offset: u64, bit: u8) {
        let mut byte = [0];
        if self.now.read(offset, &mut byte).is_ok() {
            byte[0] ^= 1 << (bit % 8);
            self.now.write(offset, &byte);
            self.durable.write(offset, &byte);
        }
    }

    /// The units that a range touches.
    fn units(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let unit = self.unit.bytes();
        offset / unit..(offset + len).div_ceil(unit)
    }

    /// Applies a change and remembers the units that it touched.
    fn change(&mut self, offset: u64, len: u64, apply: impl FnOnce(&mut SparseBytes)) {
        apply(&mut self.now);
        let unit = self.unit.bytes();
        let end = (offset + len).min(self.now.len());
        for index in offset / unit..end.div_ceil(unit) {
            let bytes = (self.now.len() - index * unit).min(unit);
            let mut version = vec![0; bytes as usize].into_boxed_slice();
            self.now.read(index * unit, &mut version).expect("the unit begins before the end");
            self.unsynced.entry(index).or_default().push(version);
            self.forgotten.remove(&index);
        }
    }
}

impl Media for FaultyMedia {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut shared = self.operate()?;
        let units = shared.units(offset, buf.len() as u64);
        shared.forgotten.retain(|unit| !units.contains(unit));
        shared.now.read(offset, buf)
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<TryIo> {
        let mut shared = self.operate()?;
        let units = shared.units(offset, buf.len() as u64);
        let is_in_memory = shared.forgotten.range(units).next().is_none();
        if shared.try_reads == TryReads::Never || !is_in_memory || shared.random.below(4) == 0 {
            return Ok(TryIo::WouldBlock);
        }
        shared.now.read(offset, buf).map(|()| TryIo::Done)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut shared = self.operate()?;
        let unit = shared.unit.bytes();
        let fits = match &mut shared.room_bytes {
            None => data.len(),
            Some(room) => {
                let mut fits = (data.len() as u64).min(*room);
                if fits < data.len() as u64 {
                    // File systems take space by whole units.
                    fits -= ((offset + fits) % unit).min(fits);
                }
                *room -= fits;
                fits as usize
            }
        };
        if fits > 0 {
            shared.change(offset, fits as u64, |now| now.write(offset, &data[..fits]));
        }
        if fits < data.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut shared = self.operate()?;
        let end = offset.saturating_add(len).min(shared.now.len());
        if offset < end {
            shared.change(offset, end - offset, |now| now.zero(offset, end - offset));
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut shared = self.operate()?;
        if shared.syncs == Syncs::Fail {
            return Err(io::Error::other("this medium cannot sync"));
        }
        shared.sync_count += 1;
        let shared = &mut *shared;
        let unit = shared.unit.bytes();
        for (index, versions) in std::mem::take(&mut shared.unsynced) {
            if let Some(current) = versions.last() {
                shared.durable.write(index * unit, current);
            }
        }
        shared.durable.set_len(shared.now.len());
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.operate()?.now.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut shared = self.operate()?;
        let old = shared.now.len();
        shared.change(len.min(old), len.abs_diff(old), |now| now.set_len(len));
        Ok(())
    }
}
