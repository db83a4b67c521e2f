//! The SCSI commands of an initiator (SPC-4, SBC-3): their bytes, and what answers to them mean.
//!
//! Answers are foreign bytes: what is cut off or makes no sense is an error or is taken as not said.

use block::limits::EXTENTS_MAX;
use block::{DiskError, Extent, ExtentKind};

use super::limits::STATUSES_BYTES;
use super::session::{Command, Reply, Transfer};
use crate::pdu::Cdb;
use crate::scsi::{Sense, Status};

/// Room in bytes for the answers to INQUIRY and MODE SENSE (6): what one byte of the command can ask for.
const SHORT_ANSWER_BYTES: u8 = 252;

/// A command without data.
fn plain(start: &[u8]) -> Command {
    Command { cdb: cdb(start), transfer: Transfer::None }
}

/// A command that asks for at most `len` bytes.
fn asking(start: &[u8], len: u32) -> Command {
    Command { cdb: cdb(start), transfer: Transfer::In(len) }
}

fn cdb(start: &[u8]) -> Cdb {
    let mut cdb = [0; 16];
    cdb[..start.len()].copy_from_slice(start);
    cdb
}

/// A command of 16 bytes on a range of blocks.
fn on_blocks(code: u8, second: u8, block: u64, blocks: u32) -> Cdb {
    let mut cdb = cdb(&[code, second]);
    cdb[2..10].copy_from_slice(&block.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

pub(super) fn test_unit_ready() -> Command {
    plain(&[0x00])
}

/// INQUIRY: the standard data.
pub(super) fn inquiry() -> Command {
    asking(&[0x12, 0, 0, 0, SHORT_ANSWER_BYTES], SHORT_ANSWER_BYTES.into())
}

/// INQUIRY: a page of vital product data.
pub(super) fn page(code: u8) -> Command {
    asking(&[0x12, 1, code, 0, SHORT_ANSWER_BYTES], SHORT_ANSWER_BYTES.into())
}

pub(super) fn read_capacity_16() -> Command {
    const LEN: u8 = 32;
    asking(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, LEN], LEN.into())
}

pub(super) fn read_capacity_10() -> Command {
    asking(&[0x25], 8)
}

/// MODE SENSE (6) for all pages, without block descriptors.
pub(super) fn mode_sense() -> Command {
    asking(&[0x1a, 0x08, 0x3f, 0, SHORT_ANSWER_BYTES], SHORT_ANSWER_BYTES.into())
}

pub(super) fn read(block: u64, blocks: u32, len: u32) -> Command {
    Command { cdb: on_blocks(0x88, 0, block, blocks), transfer: Transfer::In(len) }
}

pub(super) fn write(block: u64, blocks: u32, data: &[u8]) -> Command {
    Command { cdb: on_blocks(0x8a, 0, block, blocks), transfer: Transfer::Out(data.into()) }
}

/// SYNCHRONIZE CACHE (10) of the whole medium.
pub(super) fn synchronize_cache() -> Command {
    plain(&[0x35])
}

/// Whether WRITE SAME may deallocate instead of writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unmapping {
    /// It may: the blocks read as zeroes then, because that is what is to be written.
    Allowed,
    /// It writes.
    No,
}

/// WRITE SAME (16) of one block of zeroes.
pub(super) fn write_same_zeroes(block: u64, blocks: u32, block_bytes: u32, unmapping: Unmapping) -> Command {
    let unmap = if unmapping == Unmapping::Allowed { 0x08 } else { 0 };
    let zeroes = vec![0; block_bytes as usize];
    Command { cdb: on_blocks(0x93, unmap, block, blocks), transfer: Transfer::Out(zeroes.into()) }
}

/// UNMAP of one range.
pub(super) fn unmap(block: u64, blocks: u32) -> Command {
    const LIST_BYTES: u8 = 24;
    let mut list = [0; LIST_BYTES as usize];
    list[1] = LIST_BYTES - 2;
    list[3] = LIST_BYTES - 8;
    list[8..16].copy_from_slice(&block.to_be_bytes());
    list[16..20].copy_from_slice(&blocks.to_be_bytes());
    Command {
        cdb: cdb(&[0x42, 0, 0, 0, 0, 0, 0, 0, LIST_BYTES]),
        transfer: Transfer::Out(list.as_slice().into()),
    }
}

pub(super) fn get_lba_status(block: u64) -> Command {
    Command { cdb: on_blocks(0x9e, 0x12, block, STATUSES_BYTES), transfer: Transfer::In(STATUSES_BYTES) }
}

/// What GET LBA STATUS told of the bytes from block `start` on, in order and without gaps.
pub(super) fn extents_of(data: &[u8], start: u64, block_bytes: u32) -> Vec<Extent> {
    const MAPPED: u8 = 0;
    let mut out: Vec<Extent> = Vec::new();
    let mut at = start;
    for entry in data.get(8..).unwrap_or_default().chunks_exact(16).take(EXTENTS_MAX) {
        let (first, blocks) = (number(&entry[..8]), number(&entry[8..12]));
        let Some(end) = first.checked_add(blocks).filter(|end| first <= at && *end > at) else { break };
        // The difference of two numbers of blocks fits 32 bits, hence its bytes fit 64.
        let len = (end - at).min(u32::MAX.into()) * u64::from(block_bytes);
        let kind = if entry[12] & 0x0f == MAPPED { ExtentKind::Data } else { ExtentKind::Hole };
        match out.last_mut() {
            Some(last) if last.kind == kind => last.len += len,
            _ => out.push(Extent { len, kind }),
        }
        at = end;
    }
    out
}

/// A big-endian number of up to eight bytes.
pub(super) fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// What to do about an answer.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The command was carried out.
    Good,
    /// Something has happened to the unit, or to the command: repeat it at once.
    Again(String),
    /// The unit cannot do it just now: repeat it after a while.
    Later(String),
    /// The unit does not know the command, or not in this form.
    Unknown(String),
    /// The unit has another size now.
    Resized,
    /// There is no such unit.
    Gone,
    /// It failed.
    Failed(DiskError),
}

/// Sense data as far as it matters here: key, additional code, and whether it is about an earlier command.
fn sense_of(bytes: &[u8]) -> Option<(u8, u16, bool)> {
    let code = |at| bytes.get(at..at + 2).map_or(0, |code| u16::from_be_bytes([code[0], code[1]]));
    match bytes.first()? & 0x7f {
        kind @ (0x70 | 0x71) => Some((bytes.get(2)? & 0x0f, code(12), kind == 0x71)),
        kind @ (0x72 | 0x73) => Some((bytes.get(1)? & 0x0f, code(2), kind == 0x73)),
        _ => None,
    }
}

/// What an answer means.
pub(super) fn classify(reply: &Reply) -> Verdict {
    const BUSY: u8 = 0x08;
    const TASK_ABORTED: u8 = 0x40;
    const FULL: u8 = Status::TaskSetFull as u8;
    let failed = |why: String| Verdict::Failed(DiskError::Io(why));
    match reply.status {
        0 => Verdict::Good,
        0x02 => match sense_of(&reply.sense) {
            Some((key, code, false)) => classify_sense(key, code),
            Some((key, code, true)) => failed(format!("an earlier write failed: {}", words(key, code))),
            None => failed("the unit reports an error, and does not say which".to_owned()),
        },
        BUSY | FULL => Verdict::Later("the target is busy".to_owned()),
        TASK_ABORTED => Verdict::Again("somebody aborted the command".to_owned()),
        0x18 => failed("another initiator has reserved the logical unit".to_owned()),
        status => failed(format!("the target answered with the SCSI status {status:#04x}")),
    }
}

fn classify_sense(key: u8, code: u16) -> Verdict {
    const NOT_READY: u8 = 2;
    const UNIT_ATTENTION: u8 = 6;
    const ABORTED: u8 = 0x0b;
    const CAPACITY_CHANGED: u16 = 0x2a09;
    const INVALID_FIELD: u16 = 0x2400;
    /// Becoming ready, operation in progress, path in transition.
    const SOON: [u16; 5] = [0x0401, 0x0404, 0x0407, 0x0409, 0x040a];
    let sense = Sense { key, code, information: None, field: None };
    match (key, code) {
        (0 | 1, _) => Verdict::Good,
        (UNIT_ATTENTION, CAPACITY_CHANGED) => Verdict::Resized,
        (UNIT_ATTENTION | ABORTED, _) => Verdict::Again(words(key, code)),
        (NOT_READY, code) if SOON.contains(&code) => Verdict::Later(words(key, code)),
        _ if sense == Sense::NO_UNIT => Verdict::Gone,
        _ if sense == Sense::OPERATION_CODE || (sense.key, code) == (5, INVALID_FIELD) => {
            Verdict::Unknown(words(key, code))
        }
        _ if code == Sense::NO_SPACE.code => Verdict::Failed(DiskError::NoSpace),
        _ if code == Sense::WRITE_PROTECTED.code => Verdict::Failed(DiskError::ReadOnly),
        _ => Verdict::Failed(DiskError::Io(words(key, code))),
    }
}

/// Sense data for people.
fn words(key: u8, code: u16) -> String {
    const KEYS: [&str; 16] = [
        "no sense",
        "recovered error",
        "not ready",
        "medium error",
        "hardware error",
        "illegal request",
        "unit attention",
        "data protected",
        "blank check",
        "vendor specific",
        "copy aborted",
        "aborted command",
        "reserved",
        "volume overflow",
        "miscompare",
        "completed",
    ];
    const CODES: [(u16, &str); 18] = [
        (0x0402, "an initializing command is required"),
        (0x0403, "manual intervention is required"),
        (0x0c00, "write error"),
        (0x1100, "unrecovered read error"),
        (0x2000, "invalid command operation code"),
        (0x2100, "logical block address out of range"),
        (0x2400, "invalid field in the command"),
        (0x2600, "invalid field in the parameter list"),
        (0x2700, "write protected"),
        (0x2900, "power on or reset"),
        (0x2901, "power on"),
        (0x2903, "bus device reset"),
        (0x2a01, "mode parameters changed"),
        (0x2f00, "commands cleared by another initiator"),
        (0x3a00, "medium not present"),
        (0x3f0e, "reported logical units changed"),
        (0x4400, "internal target failure"),
        (0x4701, "data phase CRC error"),
    ];
    let [high, low] = code.to_be_bytes();
    let key_name = KEYS[usize::from(key & 0x0f)];
    let name =
        CODES.iter().find(|(known, _)| *known == code).map_or(String::new(), |(_, n)| format!(", {n}"));
    format!("the logical unit reports: {key_name}{name} (sense {key:X}/{high:02X}/{low:02X})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(sense: Vec<u8>) -> Verdict {
        classify(&Reply { status: 2, data: Vec::new(), sense, is_whole: true })
    }

    fn fixed(key: u8, code: u16) -> Verdict {
        let sense = Sense { key, code, information: None, field: None };
        let both = [check(sense.fixed()), check(sense.descriptors())].map(|v| format!("{v:?}"));
        assert_eq!(both[0], both[1], "both formats mean the same");
        check(sense.fixed())
    }

    #[test]
    fn sense_data_becomes_the_callers_next_move() {
        assert!(matches!(fixed(7, 0x2707), Verdict::Failed(DiskError::NoSpace)));
        assert!(matches!(fixed(7, 0x2700), Verdict::Failed(DiskError::ReadOnly)));
        assert!(matches!(fixed(6, 0x2900), Verdict::Again(_)));
        assert!(matches!(fixed(6, 0x2a09), Verdict::Resized));
        assert!(matches!(fixed(5, 0x2500), Verdict::Gone));
        assert!(matches!(fixed(5, 0x2000), Verdict::Unknown(_)));
        assert!(matches!(fixed(2, 0x0401), Verdict::Later(_)));
        assert!(matches!(fixed(2, 0x3a00), Verdict::Failed(DiskError::Io(_))));
        let Verdict::Failed(DiskError::Io(words)) = fixed(3, 0x1100) else { panic!("a medium error fails") };
        assert!(words.contains("medium error, unrecovered read error (sense 3/11/00)"), "{words}");
        let mut deferred = Sense::attention_like(6, 0x2900);
        deferred[0] = 0x71;
        assert!(matches!(check(deferred), Verdict::Failed(_)), "an earlier write was lost");
    }

    impl Sense {
        fn attention_like(key: u8, code: u16) -> Vec<u8> {
            Sense { key, code, information: None, field: None }.fixed()
        }
    }

    #[test]
    fn statuses_that_pass_are_waited_for() {
        let status =
            |status| classify(&Reply { status, data: Vec::new(), sense: Vec::new(), is_whole: true });
        assert!(matches!(status(0), Verdict::Good));
        assert!(matches!(status(0x08), Verdict::Later(_)));
        assert!(matches!(status(0x28), Verdict::Later(_)));
        assert!(matches!(status(0x40), Verdict::Again(_)));
        assert!(matches!(status(0x18), Verdict::Failed(_)));
        assert!(matches!(status(0x02), Verdict::Failed(_)), "an error without sense data is one");
    }

    fn statuses(ranges: &[(u64, u32, u8)]) -> Vec<u8> {
        let mut data = vec![0; 8];
        for (first, blocks, kind) in ranges {
            data.extend_from_slice(&first.to_be_bytes());
            data.extend_from_slice(&blocks.to_be_bytes());
            data.extend_from_slice(&[*kind, 0, 0, 0]);
        }
        data
    }

    #[test]
    fn ranges_of_blocks_become_extents_without_gaps() {
        let data = statuses(&[(8, 8, 1), (16, 4, 2), (20, 4, 0), (30, 1, 1)]);
        let expected = [
            Extent { len: 8 * 512, kind: ExtentKind::Hole },
            Extent { len: 4 * 512, kind: ExtentKind::Data },
        ];
        assert_eq!(extents_of(&data, 12, 512), expected);
        assert_eq!(extents_of(&data, 0, 512), []);
        assert_eq!(extents_of(&data[..20], 12, 512), []);
        assert_eq!(extents_of(&statuses(&[(u64::MAX, 9, 1)]), u64::MAX, 4096), []);
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(data: Vec<u8>, start: u64, status: u8) {
            let _ = extents_of(&data, start, 4096);
            let _ = classify(&Reply { status, data: Vec::new(), sense: data.clone(), is_whole: true });
            let _ = check(data);
        }
    }
}
