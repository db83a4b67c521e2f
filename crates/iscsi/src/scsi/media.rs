//! Commands that need the medium or data from the initiator, checked as far as that is possible before.

use super::mode::Form;
use super::nexus::Era;
use super::opcodes::Command;
use super::sense::Sense;
use super::{LOGICAL_BLOCK_BYTES, number};
use crate::limits::{
    CLEAR_BLOCKS_MAX, LBA_STATUS_BYTES, PARAMETERS_BYTES_MAX, STEP_BYTES, TRANSFER_BYTES_MAX,
};
use crate::pdu::Cdb;

/// A range of logical blocks that lies on the unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Range {
    /// The first block.
    pub block: u64,
    /// How many.
    pub blocks: u64,
}

impl Range {
    /// Its first byte.
    pub fn offset(&self) -> u64 {
        self.block * u64::from(LOGICAL_BLOCK_BYTES)
    }

    /// Its length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.blocks * u64::from(LOGICAL_BLOCK_BYTES)
    }
}

/// What is left of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    pub(super) kind: Kind,
    pub(super) range: Range,
    /// Bytes that the initiator has to send for it.
    pub data_out_bytes: u32,
    /// Bytes that a read answers with; 0 for every other command.
    pub read_bytes: u32,
    /// When it began.
    pub era: Era,
}

/// Whether a write has to be durable before it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Force {
    /// No.
    Cached,
    /// Yes: FUA.
    Durable,
}

/// What a range is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compare {
    /// Nothing: it only has to be readable.
    Nothing,
    /// As much data.
    Range,
    /// One block of data, with each block.
    EachBlock,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read(Force),
    Write(Force),
    WriteVerify(Compare),
    Verify(Compare),
    /// Zeroes if there is no data.
    WriteSame,
    CompareAndWrite(Force),
    OrWrite(Force),
    Unmap,
    Flush,
    Prefetch,
    LbaStatus {
        answer_bytes_max: u64,
    },
    ModeSelect(Form),
    PersistentOut {
        action: u8,
        scope_and_type: u8,
    },
}

impl Work {
    fn new(kind: Kind, range: Range, data_out_bytes: u64) -> Work {
        let data_out_bytes = u32::try_from(data_out_bytes).expect("transfers are bounded");
        Work { kind, range, data_out_bytes, read_bytes: 0, era: Era::default() }
    }

    pub(super) fn flush() -> Work {
        Work::new(Kind::Flush, Range::default(), 0)
    }

    /// Refuses to combine a block that is compared or repeated with more or less data than it has. `offered`
    /// is what the initiator means to send.
    pub fn check_offer(&self, offered: u32) -> Result<(), Sense> {
        let wrong = self.data_out_bytes != offered;
        match self.kind {
            Kind::CompareAndWrite(_) if wrong => Err(Sense::in_command(13)),
            Kind::WriteSame if wrong => Err(Sense::INFORMATION_UNIT),
            _ => Ok(()),
        }
    }

    /// Memory in bytes that carrying it out takes, besides its data.
    pub fn scratch_bytes(&self) -> usize {
        match self.kind {
            Kind::Read(_) | Kind::Write(_) | Kind::Flush | Kind::Unmap => 0,
            Kind::ModeSelect(_) | Kind::PersistentOut { .. } => 0,
            Kind::LbaStatus { .. } => LBA_STATUS_BYTES,
            _ => STEP_BYTES,
        }
    }

    /// Whether this is a plain read, for [`Unit::try_read`](super::Unit::try_read).
    pub fn is_read(&self) -> bool {
        matches!(self.kind, Kind::Read(_))
    }
}

/// Where the fields of a command lie, by its length.
struct Fields<'a> {
    cdb: &'a Cdb,
    range: Range,
    /// First byte of the length.
    length_at: u16,
}

impl<'a> Fields<'a> {
    fn of(cdb: &'a Cdb) -> Fields<'a> {
        let (block, blocks, length_at) = match cdb[0] >> 5 {
            0 => {
                let block = number(&[cdb[1] & 0x1f, cdb[2], cdb[3]]);
                // SBC-3 §5.8: none means 256.
                (block, if cdb[4] == 0 { 256 } else { cdb[4].into() }, 4)
            }
            1 | 2 => (number(&cdb[2..6]), number(&cdb[7..9]), 7),
            5 => (number(&cdb[2..6]), number(&cdb[6..10]), 6),
            _ => (number(&cdb[2..10]), number(&cdb[10..14]), 10),
        };
        Fields { cdb, range: Range { block, blocks }, length_at }
    }

    /// No unit has protection information, so none can be asked for.
    fn check_protection(&self) -> Result<(), Sense> {
        if self.cdb[0] >> 5 != 0 && self.cdb[1] >> 5 != 0 { Err(Sense::in_command(1)) } else { Ok(()) }
    }

    fn force(&self) -> Force {
        let forced = self.cdb[0] >> 5 != 0 && self.cdb[1] & 8 != 0;
        if forced { Force::Durable } else { Force::Cached }
    }

    fn check_length(&self, blocks_max: u32) -> Result<(), Sense> {
        if self.range.blocks > u64::from(blocks_max) {
            return Err(Sense::in_command(self.length_at));
        }
        Ok(())
    }

    fn compare(&self) -> Result<Compare, Sense> {
        match self.cdb[1] >> 1 & 3 {
            0 => Ok(Compare::Nothing),
            1 => Ok(Compare::Range),
            3 => Ok(Compare::EachBlock),
            _ => Err(Sense::in_command(1)),
        }
    }
}

/// A command about a range of blocks, of a unit that has `size` blocks.
pub(super) fn parse(command: Command, cdb: &Cdb, size: u64) -> Result<Work, Sense> {
    const TRANSFER_BLOCKS_MAX: u32 = TRANSFER_BYTES_MAX / LOGICAL_BLOCK_BYTES;
    if command == Command::Unmap {
        return unmap(cdb);
    }
    let mut fields = Fields::of(cdb);
    match command {
        Command::CompareAndWrite => {
            fields.range.blocks = cdb[13].into();
            fields.length_at = 13;
        }
        Command::SynchronizeCache | Command::LbaStatus | Command::Prefetch => {}
        _ => fields.check_protection()?,
    }
    if command == Command::LbaStatus {
        return lba_status(cdb, size);
    }
    let range = fields.range;
    if range.block.checked_add(range.blocks).is_none_or(|end| end > size) {
        return Err(Sense::OUT_OF_RANGE);
    }
    let transfers = matches!(
        command,
        Command::Read | Command::Write | Command::WriteVerify | Command::OrWrite | Command::Prefetch
    );
    if transfers {
        fields.check_length(TRANSFER_BLOCKS_MAX)?;
    }
    let len = range.len_bytes();
    let block = u64::from(LOGICAL_BLOCK_BYTES);
    Ok(match command {
        Command::Read => {
            let read_bytes = u32::try_from(len).expect("transfers are bounded");
            Work { read_bytes, ..Work::new(Kind::Read(fields.force()), range, 0) }
        }
        Command::Write => Work::new(Kind::Write(fields.force()), range, len),
        Command::OrWrite => Work::new(Kind::OrWrite(fields.force()), range, len),
        Command::CompareAndWrite => Work::new(Kind::CompareAndWrite(fields.force()), range, 2 * len),
        Command::WriteVerify => match fields.compare()? {
            Compare::EachBlock => return Err(Sense::in_command(1)),
            compare => Work::new(Kind::WriteVerify(compare), range, len),
        },
        Command::Verify => {
            let compare = fields.compare()?;
            let data = match compare {
                Compare::Nothing => 0,
                Compare::Range => {
                    fields.check_length(TRANSFER_BLOCKS_MAX)?;
                    len
                }
                Compare::EachBlock => block.min(len),
            };
            Work::new(Kind::Verify(compare), range, data)
        }
        Command::WriteSame => write_same(&fields)?,
        Command::Prefetch => Work::new(Kind::Prefetch, range, 0),
        _ => Work::flush(),
    })
}

fn write_same(fields: &Fields<'_>) -> Result<Work, Sense> {
    const ANCHOR: u8 = 0x10;
    const LOGICAL_BLOCK_DATA: u8 = 0x06;
    const NO_DATA: u8 = 0x01;
    let flags = fields.cdb[1];
    // Nothing is anchored here, and the obsolete forms wrote addresses into the blocks.
    if flags & (ANCHOR | LOGICAL_BLOCK_DATA) != 0 {
        return Err(Sense::in_command(1));
    }
    // The Block Limits page says that none does not mean all.
    if fields.range.blocks == 0 {
        return Err(Sense::in_command(fields.length_at));
    }
    fields.check_length(CLEAR_BLOCKS_MAX)?;
    let is_long = fields.cdb[0] >> 5 == 4;
    let data = if is_long && flags & NO_DATA != 0 { 0 } else { LOGICAL_BLOCK_BYTES };
    // Space is given back whether UNMAP is set or not: zeroes read the same either way.
    Ok(Work::new(Kind::WriteSame, fields.range, data.into()))
}

fn unmap(cdb: &Cdb) -> Result<Work, Sense> {
    const ANCHOR: u8 = 1;
    if cdb[1] & ANCHOR != 0 {
        return Err(Sense::in_command(1));
    }
    Ok(Work::new(Kind::Unmap, Range::default(), number(&cdb[7..9])))
}

fn lba_status(cdb: &Cdb, size: u64) -> Result<Work, Sense> {
    let block = number(&cdb[2..10]);
    if block >= size {
        return Err(Sense::OUT_OF_RANGE);
    }
    let kind = Kind::LbaStatus { answer_bytes_max: number(&cdb[10..14]) };
    Ok(Work::new(kind, Range { block, blocks: size - block }, 0))
}

/// MODE SELECT with its parameter list.
pub(super) fn mode_select(cdb: &Cdb) -> Result<Work, Sense> {
    let (form, len) = Form::of_select(cdb)?;
    Ok(Work::new(Kind::ModeSelect(form), Range::default(), len))
}

/// PERSISTENT RESERVE OUT with its parameter list.
pub(super) fn persistent_out(cdb: &Cdb) -> Result<Work, Sense> {
    let len = number(&cdb[5..9]);
    if len > u64::from(PARAMETERS_BYTES_MAX) {
        return Err(Sense::PARAMETER_LENGTH);
    }
    let kind = Kind::PersistentOut { action: cdb[1] & 0x1f, scope_and_type: cdb[2] };
    Ok(Work::new(kind, Range::default(), len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::opcodes::COMMANDS;
    use proptest::prelude::*;

    fn cdb(bytes: &[u8]) -> Cdb {
        let mut cdb = [0; 16];
        cdb[..bytes.len()].copy_from_slice(bytes);
        cdb
    }

    #[test]
    fn ranges_end_at_the_last_block_and_empty_ones_just_behind_it() {
        let read = |block: u8, blocks: u8| {
            parse(Command::Read, &cdb(&[0x28, 0, 0, 0, 0, block, 0, 0, blocks]), 100).map(|work| work.range)
        };
        assert_eq!(read(99, 1), Ok(Range { block: 99, blocks: 1 }));
        assert_eq!(read(100, 0), Ok(Range { block: 100, blocks: 0 }));
        assert_eq!(read(100, 1), Err(Sense::OUT_OF_RANGE));
        assert_eq!(read(101, 0), Err(Sense::OUT_OF_RANGE));
    }

    #[test]
    fn the_short_read_takes_no_blocks_for_256() {
        let work = parse(Command::Read, &cdb(&[0x08, 0, 0, 5, 0]), 1000).unwrap();
        assert_eq!((work.range, work.read_bytes), (Range { block: 5, blocks: 256 }, 256 * 512));
    }

    #[test]
    fn what_is_longer_than_the_limits_is_refused() {
        let long = cdb(&[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1]);
        assert_eq!(parse(Command::Read, &long, 1 << 30), Err(Sense::in_command(10)));
    }

    proptest! {
        #[test]
        fn whatever_begins_lies_on_the_unit_and_is_bounded(
            bytes: [u8; 16], form in 0..COMMANDS.len(), size in 0u64..10_000, small: bool,
        ) {
            let mut cdb = bytes;
            cdb[0] = COMMANDS[form].opcode;
            if small {
                cdb[2..9].fill(0);
            }
            if let Ok(work) = parse(COMMANDS[form].command, &cdb, size) {
                prop_assert!(work.range.block + work.range.blocks <= size);
                prop_assert!(work.data_out_bytes <= 2 * TRANSFER_BYTES_MAX);
                prop_assert!(work.read_bytes <= TRANSFER_BYTES_MAX);
            }
        }
    }
}
