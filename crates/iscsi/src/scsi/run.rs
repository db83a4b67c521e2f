//! Carrying out what needs the medium.

use block::{DiskError, ExtentKind, TryIo};

use super::media::{Compare, Force, Kind, Range, Work};
use super::nexus::Nexus;
use super::sense::{Fault, Sense};
use super::unit::Unit;
use super::{LOGICAL_BLOCK_BYTES, Reply, number, truncated};
use crate::limits::{CLEAR_BLOCKS_MAX, STEP_BYTES, UNMAP_DESCRIPTORS_MAX};

const BLOCK: usize = LOGICAL_BLOCK_BYTES as usize;

impl Unit {
    /// Reads into `buf`, which has [`Work::read_bytes`] or fewer, if that needs no waiting.
    pub fn try_read(&self, work: &Work, buf: &mut [u8]) -> Result<TryIo, Fault> {
        if work.kind != Kind::Read(Force::Cached) {
            return Ok(TryIo::WouldBlock);
        }
        self.disk
            .try_read(work.range.offset(), buf)
            .map_err(|error| Sense::of_read(&error, work.range.block).into())
    }

    /// Reads into `buf`, which has [`Work::read_bytes`] or fewer.
    pub async fn read(&self, work: &Work, buf: &mut [u8]) -> Result<(), Fault> {
        if work.kind == Kind::Read(Force::Durable) {
            // What is told must be on the medium.
            self.flush(work).await?;
        }
        let read = self.disk.read(work.range.offset(), buf).await;
        read.map_err(|error| Sense::of_read(&error, work.range.block).into())
    }

    /// Writes if this is a plain write that needs no waiting.
    pub fn try_write(&self, work: &Work, data: &[u8]) -> Result<TryIo, Fault> {
        let plain = work.kind == Kind::Write(Force::Cached) && data.len() as u64 == work.range.len_bytes();
        let Ok(_shared) = self.gate.try_read() else { return Ok(TryIo::WouldBlock) };
        if !plain {
            return Ok(TryIo::WouldBlock);
        }
        self.disk
            .try_write(work.range.offset(), data)
            .map_err(|error| Sense::of_write(&error, work.range.block).into())
    }

    /// Carries out anything but a read. `data` is what the initiator sent, at most
    /// [`Work::data_out_bytes`]; if that is less, writes write what came, and all others are refused.
    pub async fn run(&self, nexus: &Nexus, work: &Work, data: &[u8]) -> Reply {
        match self.try_run(nexus, work, data).await {
            Ok(data) => Reply::data(data),
            Err(fault) => self.refuse(fault),
        }
    }

    async fn try_run(&self, nexus: &Nexus, work: &Work, data: &[u8]) -> Result<Vec<u8>, Fault> {
        let complete = data.len() == work.data_out_bytes as usize;
        let divisible = matches!(work.kind, Kind::Write(_) | Kind::WriteVerify(_));
        if !complete && !divisible {
            return Err(Sense::INFORMATION_UNIT.into());
        }
        match work.kind {
            Kind::Read(_) => return Err(Sense::INTERNAL.into()),
            Kind::Write(force) => {
                let _shared = self.gate.read().await;
                self.write(work, data).await?;
                self.force(force, work).await?;
            }
            Kind::WriteVerify(compare) => {
                let _shared = self.gate.read().await;
                self.write(work, data).await?;
                self.flush(work).await?;
                let written = work.range.with_bytes(data.len());
                self.compare(written, if compare == Compare::Range { Some(data) } else { None }).await?;
            }
            Kind::Verify(compare) => {
                self.compare(work.range, if compare == Compare::Nothing { None } else { Some(data) }).await?;
            }
            Kind::WriteSame => {
                let _shared = self.gate.read().await;
                self.write_same(work, data).await?;
            }
            Kind::CompareAndWrite(force) => {
                let (expected, new) = data.split_at(data.len() / 2);
                let _alone = self.alone(work).await?;
                self.compare(work.range, Some(expected)).await?;
                self.write(work, new).await?;
                self.force(force, work).await?;
            }
            Kind::OrWrite(force) => {
                let _alone = self.alone(work).await?;
                self.or_write(work, data).await?;
                self.force(force, work).await?;
            }
            Kind::Unmap => {
                let ranges = unmap_ranges(data, self.blocks())?;
                let _shared = self.gate.read().await;
                for range in ranges {
                    let discarded = self.disk.discard(range.offset(), range.len_bytes()).await;
                    discarded.map_err(|error| Sense::of_write(&error, range.block))?;
                }
            }
            Kind::Flush => self.flush(work).await?,
            Kind::Prefetch => self.compare(work.range, None).await?,
            Kind::LbaStatus { answer_bytes_max } => return self.lba_status(work, answer_bytes_max).await,
            Kind::ModeSelect(_) => self.mode_select(nexus, work, data)?,
            // Who preempts counts on it that nothing of the others comes after the answer.
            Kind::PersistentOut { .. } => self.persistent_out(nexus, work, data)?.await,
        }
        Ok(Vec::new())
    }

    /// Keeps all writers out, after the range was brought near, so that they do not wait for a fetch.
    async fn alone(&self, work: &Work) -> Result<tokio::sync::RwLockWriteGuard<'_, ()>, Fault> {
        self.compare(work.range, None).await?;
        Ok(self.gate.write().await)
    }

    async fn fill(&self, range: Range, buf: &mut [u8]) -> Result<(), Fault> {
        let read = self.disk.read(range.offset(), buf).await;
        read.map_err(|error| Sense::of_read(&error, range.block).into())
    }

    async fn write(&self, work: &Work, data: &[u8]) -> Result<(), Fault> {
        // Of a block that did not come whole nothing is written.
        let whole = &data[..data.len() / BLOCK * BLOCK];
        let written = self.disk.write(work.range.offset(), whole).await;
        written.map_err(|error| Sense::of_write(&error, work.range.block).into())
    }

    /// Sets the bits of data in a range of the same length, which others are kept from.
    async fn or_write(&self, work: &Work, data: &[u8]) -> Result<(), Fault> {
        let mut bytes = vec![0; STEP_BYTES.min(data.len())];
        for (step, masks) in work.range.steps().zip(data.chunks(STEP_BYTES)) {
            let bytes = &mut bytes[..masks.len()];
            self.fill(step, bytes).await?;
            bytes.iter_mut().zip(masks).for_each(|(byte, mask)| *byte |= mask);
            let written = self.disk.write(step.offset(), bytes).await;
            written.map_err(|error| Sense::of_write(&error, step.block))?;
        }
        Ok(())
    }

    async fn force(&self, force: Force, work: &Work) -> Result<(), Fault> {
        if force == Force::Durable { self.flush(work).await } else { Ok(()) }
    }

    async fn flush(&self, work: &Work) -> Result<(), Fault> {
        let flushed = self.disk.flush().await;
        flushed.map_err(|error| Sense::of_write(&error, work.range.block).into())
    }

    /// Compares a range with data, over and over if there is less of it; without data it is only read.
    async fn compare(&self, range: Range, data: Option<&[u8]>) -> Result<(), Fault> {
        let mut bytes = vec![0; STEP_BYTES.min(usize::try_from(range.len_bytes()).unwrap_or(usize::MAX))];
        for step in range.steps() {
            let bytes = &mut bytes[..usize::try_from(step.len_bytes()).expect("a step is short")];
            self.fill(step, bytes).await?;
            let Some(data) = data else { continue };
            for (at, block) in bytes.chunks(BLOCK).enumerate() {
                let offset = (step.block - range.block) as usize * BLOCK + at * BLOCK;
                let expected = &data[offset % data.len()..][..BLOCK];
                if let Some(differs) = block.iter().zip(expected).position(|(a, b)| a != b) {
                    return Err(Sense::miscompare((offset + differs) as u64).into());
                }
            }
        }
        Ok(())
    }

    async fn write_same(&self, work: &Work, block: &[u8]) -> Result<(), Fault> {
        let failed = |error: DiskError| Fault::from(Sense::of_write(&error, work.range.block));
        if block.iter().all(|byte| *byte == 0) {
            let zeroed = self.disk.write_zeroes(work.range.offset(), work.range.len_bytes()).await;
            return zeroed.map_err(failed);
        }
        let pattern = block.repeat(STEP_BYTES / BLOCK);
        for step in work.range.steps() {
            let len = usize::try_from(step.len_bytes()).expect("a step is short");
            self.disk.write(step.offset(), &pattern[..len]).await.map_err(failed)?;
        }
        Ok(())
    }

    /// GET LBA STATUS: as many descriptors as there is room for, one at least if there is.
    async fn lba_status(&self, work: &Work, answer_bytes_max: u64) -> Result<Vec<u8>, Fault> {
        const HEAD_BYTES: u64 = 8;
        const DESCRIPTOR_BYTES: u64 = 16;
        let extents = self.disk.extents(work.range.offset(), work.range.len_bytes()).await;
        let extents = extents.map_err(|error| Sense::of_read(&error, work.range.block))?;
        let extents = extents.into_iter().map(|extent| (extent.len, extent.kind));
        let room = answer_bytes_max.saturating_sub(HEAD_BYTES) / DESCRIPTOR_BYTES;
        let mut descriptors = Vec::new();
        for (range, kind) in whole_blocks(work.range, extents).into_iter().take(room.max(1) as usize) {
            descriptors.extend_from_slice(&range.block.to_be_bytes());
            descriptors.extend_from_slice(&u32::try_from(range.blocks).unwrap_or(u32::MAX).to_be_bytes());
            descriptors.extend_from_slice(&[u8::from(kind == ExtentKind::Hole), 0, 0, 0]);
        }
        let len = u32::try_from(descriptors.len() + 4).expect("extents are bounded").to_be_bytes();
        Ok(truncated([&len[..], &[0; 4], &descriptors].concat(), answer_bytes_max))
    }
}

impl Range {
    /// Its beginning, of as many whole blocks as `len` bytes hold.
    fn with_bytes(self, len: usize) -> Range {
        Range { blocks: self.blocks.min((len / BLOCK) as u64), ..self }
    }

    /// The range in pieces of at most [`STEP_BYTES`].
    fn steps(self) -> impl Iterator<Item = Range> {
        let (mut block, end) = (self.block, self.block + self.blocks);
        std::iter::from_fn(move || {
            let step = Range { block, blocks: (end - block).min((STEP_BYTES / BLOCK) as u64) };
            block += step.blocks;
            (step.blocks > 0).then_some(step)
        })
    }
}

/// Extents in whole blocks: a block that is not all hole is data. Neighbours of one kind are joined, no
/// piece is longer than its field holds, and there is at least one.
fn whole_blocks(range: Range, extents: impl Iterator<Item = (u64, ExtentKind)>) -> Vec<(Range, ExtentKind)> {
    let block = u64::from(LOGICAL_BLOCK_BYTES);
    let mut out: Vec<(Range, ExtentKind)> = Vec::new();
    let end = range.block + range.blocks;
    let (mut at, mut bytes) = (range.block, range.offset());
    for (len, kind) in extents {
        bytes += len;
        let upto = if kind == ExtentKind::Hole { bytes / block } else { bytes.div_ceil(block) }.min(end);
        let upto = upto.min(at + u64::from(u32::MAX));
        if upto <= at {
            continue;
        }
        match out.last_mut() {
            Some((last, of)) if *of == kind && last.blocks + (upto - at) <= u64::from(u32::MAX) => {
                last.blocks += upto - at;
            }
            _ => out.push((Range { block: at, blocks: upto - at }, kind)),
        }
        at = upto;
        if bytes > at * block + block {
            // The rest of an extent that got cut would be taken for its neighbour.
            break;
        }
    }
    if out.is_empty() {
        out.push((Range { blocks: range.blocks.min(u64::from(u32::MAX)), ..range }, ExtentKind::Data));
    }
    out
}

/// The ranges of an UNMAP parameter list, on a unit of `size` blocks.
fn unmap_ranges(list: &[u8], size: u64) -> Result<Vec<Range>, Sense> {
    const HEAD_BYTES: usize = 8;
    const DESCRIPTOR_BYTES: usize = 16;
    if list.is_empty() {
        return Ok(Vec::new());
    }
    if list.len() < HEAD_BYTES {
        return Err(Sense::PARAMETER_LENGTH);
    }
    let told = usize::try_from(number(&list[2..4])).expect("two bytes");
    let descriptors = &list[HEAD_BYTES..];
    let descriptors = descriptors[..told.min(descriptors.len())].chunks_exact(DESCRIPTOR_BYTES);
    if descriptors.len() > UNMAP_DESCRIPTORS_MAX as usize {
        return Err(Sense::in_parameters(2));
    }
    let mut ranges = Vec::new();
    let mut blocks = 0;
    for (i, descriptor) in descriptors.enumerate() {
        let range = Range { block: number(&descriptor[..8]), blocks: number(&descriptor[8..12]) };
        if range.block.checked_add(range.blocks).is_none_or(|end| end > size) {
            return Err(Sense::OUT_OF_RANGE);
        }
        blocks += range.blocks;
        if blocks > u64::from(CLEAR_BLOCKS_MAX) {
            return Err(Sense::in_parameters(HEAD_BYTES + i * DESCRIPTOR_BYTES + 8));
        }
        ranges.push(range);
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ExtentKind::{Data, Hole};
    use proptest::prelude::*;

    #[test]
    fn a_block_that_is_partly_data_is_data() {
        let range = Range { block: 10, blocks: 4 };
        let extents = [(700, Hole), (100, Data), (2000, Hole)];
        let blocks = |block, blocks| Range { block, blocks };
        assert_eq!(
            whole_blocks(range, extents.into_iter()),
            [(blocks(10, 1), Hole), (blocks(11, 1), Data), (blocks(12, 2), Hole)]
        );
        assert_eq!(whole_blocks(range, std::iter::empty()), [(range, Data)]);
    }

    #[test]
    fn unmap_lists_are_checked() {
        let list = |told: u16, block: u64, blocks: u32| {
            [&[0, 0][..], &told.to_be_bytes(), &[0; 4], &block.to_be_bytes(), &blocks.to_be_bytes(), &[0; 4]]
                .concat()
        };
        let one = Ok(vec![Range { block: 8, blocks: 16 }]);
        assert_eq!(unmap_ranges(&list(16, 8, 16), 100), one);
        assert_eq!(unmap_ranges(&list(999, 8, 16), 100), one);
        assert_eq!(unmap_ranges(&list(0, 8, 16), 100), Ok(vec![]));
        assert_eq!(unmap_ranges(&list(16, 90, 11), 100), Err(Sense::OUT_OF_RANGE));
        assert_eq!(unmap_ranges(&list(16, u64::MAX, 2), 100), Err(Sense::OUT_OF_RANGE));
        assert_eq!(unmap_ranges(&[0; 7], 100), Err(Sense::PARAMETER_LENGTH));
        assert_eq!(unmap_ranges(&list(16, 0, CLEAR_BLOCKS_MAX + 1), 1 << 40), Err(Sense::in_parameters(16)));
    }

    proptest! {
        #[test]
        fn foreign_lists_never_panic_and_stay_on_the_unit(list: Vec<u8>, size in 0u64..1000) {
            for range in unmap_ranges(&list, size).unwrap_or_default() {
                prop_assert!(range.block + range.blocks <= size);
            }
        }

        #[test]
        fn statuses_are_in_order_and_without_gaps(
            extents in prop::collection::vec((1u64..3000, any::<bool>()), 0..20), blocks in 1u64..50,
        ) {
            let range = Range { block: 3, blocks };
            let extents = extents.into_iter().map(|(len, hole)| (len, if hole { Hole } else { Data }));
            let mut at = 3;
            for (piece, _) in whole_blocks(range, extents) {
                prop_assert_eq!(piece.block, at);
                prop_assert!(piece.blocks > 0);
                at += piece.blocks;
            }
            prop_assert!(at <= 3 + blocks);
        }
    }
}
