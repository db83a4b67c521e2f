//! What there is to know of a logical unit before it can be used, and how it is found out.

use block::Access;
use block::limits::DISK_BYTES_MAX;

use super::ConnectError;
use super::limits::{ATTENTIONS_MAX, BACKOFF_FIRST, CLEAR_BLOCKS_MAX, PIECE_BYTES_MAX};
use super::scsi::{self, Unmapping, Verdict, classify, number};
use super::session::{Command, Reply};
use super::wire::Wire;

/// A logical unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) size_bytes: u64,
    /// Size of a logical block, 512 to 4096.
    pub(super) block_bytes: u32,
    pub(super) access: Access,
    /// Longest read or write of one command, a multiple of 4096.
    pub(super) transfer_bytes_max: u32,
    /// Whether WRITE SAME (16) is there, and how.
    pub(super) same: Option<Clearing>,
    /// Whether UNMAP is there.
    pub(super) unmap: Option<Clearing>,
    /// Whether what is not mapped is known, and reads as zeroes.
    pub(super) tells_holes: bool,
    /// Its world-wide names as it tells them, empty if it has none.
    pub(super) names: Vec<u8>,
}

/// A way to clear blocks without sending them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Clearing {
    pub(super) blocks_max: u32,
    pub(super) unmapping: Unmapping,
}

impl Unit {
    /// Whether commands that were made for `self` may go to `now`, of the same size.
    pub(super) fn can_be(&self, now: &Unit) -> bool {
        self.names == now.names
            && self.block_bytes == now.block_bytes
            && (self.access == Access::ReadOnly || now.access == Access::ReadWrite)
            && self.transfer_bytes_max <= now.transfer_bytes_max
    }
}

/// Asks a unit for everything that has to be known.
pub(super) async fn survey(wire: &mut Wire) -> Result<Unit, ConnectError> {
    ask(wire, &scsi::test_unit_ready()).await?.require()?;
    is_disk(&ask(wire, &scsi::inquiry()).await?.require()?)?;
    let pages = ask(wire, &scsi::page(0x00)).await?.optional().unwrap_or_default();
    let mut page = async |code: u8| -> Result<Vec<u8>, ConnectError> {
        if !payload(&pages, 0x00).contains(&code) {
            return Ok(Vec::new());
        }
        let data = ask(wire, &scsi::page(code)).await?.optional().unwrap_or_default();
        Ok(payload(&data, code).to_vec())
    };
    let (serial, names) = (page(0x80).await?, page(0x83).await?);
    let (limits, provisioning) = (page(0xb0).await?, page(0xb2).await?);
    let capacity = match ask(wire, &scsi::read_capacity_16()).await? {
        Told::Data(data) => capacity_16(&data),
        Told::Unknown(_) => capacity_10(&ask(wire, &scsi::read_capacity_10()).await?.require()?),
    }?;
    let mode = ask(wire, &scsi::mode_sense()).await?.optional().unwrap_or_default();
    // What is not mapped may hold anything, unless the unit says otherwise.
    let mut tells_holes = capacity.is_thin && capacity.zeroes;
    if tells_holes {
        tells_holes =
            matches!(ask(wire, &scsi::get_lba_status(0)).await?, Told::Data(data) if data.len() > 8);
    }
    let names = names_of(&names).unwrap_or(serial);
    Ok(Unit { tells_holes, names, ..unit_of(&capacity, &limits, &provisioning, &mode)? })
}

/// What a unit said.
enum Told {
    Data(Vec<u8>),
    /// It does not know the command.
    Unknown(String),
}

impl Told {
    fn require(self) -> Result<Vec<u8>, ConnectError> {
        match self {
            Told::Data(data) => Ok(data),
            Told::Unknown(why) => Err(ConnectError::Unusable(why)),
        }
    }

    fn optional(self) -> Option<Vec<u8>> {
        match self {
            Told::Data(data) => Some(data),
            Told::Unknown(_) => None,
        }
    }
}

async fn ask(wire: &mut Wire, command: &Command) -> Result<Told, ConnectError> {
    let mut attentions = 0;
    loop {
        let reply: Reply = wire.exchange(command.clone()).await?;
        let why = match classify(&reply) {
            Verdict::Good => return Ok(Told::Data(reply.data)),
            Verdict::Unknown(why) => return Ok(Told::Unknown(why)),
            // A size that has changed is asked for behind this.
            Verdict::Resized => "its size has changed".to_owned(),
            Verdict::Again(why) => why,
            Verdict::Gone => return Err(ConnectError::NoUnit),
            Verdict::Later(why) => {
                tokio::time::sleep(BACKOFF_FIRST).await;
                why
            }
            Verdict::Failed(error) => return Err(ConnectError::Unready(error.to_string())),
        };
        attentions += 1;
        if attentions > ATTENTIONS_MAX {
            return Err(ConnectError::Unready(why));
        }
    }
}

/// What a page of vital product data holds; nothing if it is another one.
fn payload(page: &[u8], code: u8) -> &[u8] {
    match page {
        [_, found, high, low, payload @ ..] if *found == code => {
            &payload[..usize::from(u16::from_be_bytes([*high, *low])).min(payload.len())]
        }
        _ => &[],
    }
}

fn is_disk(inquiry: &[u8]) -> Result<(), ConnectError> {
    match inquiry.first().map(|first| (first >> 5, first & 0x1f)) {
        Some((0, 0)) => Ok(()),
        Some((0, kind)) => {
            let why = format!("it is not a disk, but a device of the SCSI type {kind:#04x}");
            Err(ConnectError::Unusable(why))
        }
        _ => Err(ConnectError::NoUnit),
    }
}

/// The names of the unit among the designators of page 0x83: those of ports and targets change with the path.
fn names_of(designators: &[u8]) -> Option<Vec<u8>> {
    let mut names = Vec::new();
    let mut rest = designators;
    while let [_, kind, _, len, more @ ..] = rest {
        let (name, more) = more.split_at_checked(usize::from(*len))?;
        let of_unit = kind >> 4 & 3 == 0;
        if of_unit {
            names.extend_from_slice(&[*kind & 0x0f, *len]);
            names.extend_from_slice(name);
        }
        rest = more;
    }
    (!names.is_empty()).then_some(names)
}

/// What READ CAPACITY tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Capacity {
    last_block: u64,
    block_bytes: u32,
    is_thin: bool,
    zeroes: bool,
}

fn capacity_16(data: &[u8]) -> Result<Capacity, ConnectError> {
    let (Some(last_block), Some(block_bytes)) = (data.get(..8), data.get(8..12)) else {
        return Err(ConnectError::Unusable("it does not tell its size".to_owned()));
    };
    let flags = data.get(14).copied().unwrap_or_default();
    Ok(Capacity {
        last_block: number(last_block),
        block_bytes: number(block_bytes) as u32,
        is_thin: flags & 0x80 != 0,
        zeroes: flags & 0x40 != 0,
    })
}

fn capacity_10(data: &[u8]) -> Result<Capacity, ConnectError> {
    let wide = data.get(..8).map(|data| [&[0; 4], data].concat()).unwrap_or_default();
    capacity_16(&wide)
}

fn unit_of(
    capacity: &Capacity,
    limits: &[u8],
    provisioning: &[u8],
    mode: &[u8],
) -> Result<Unit, ConnectError> {
    let Capacity { last_block, block_bytes, .. } = *capacity;
    if !block_bytes.is_power_of_two() || !(512..=4096).contains(&block_bytes) {
        let why = format!("its logical blocks have {block_bytes} bytes, and only 512 to 4096 are supported");
        return Err(ConnectError::Unusable(why));
    }
    let size_bytes = last_block.checked_add(1).and_then(|blocks| blocks.checked_mul(block_bytes.into()));
    let size_bytes = size_bytes.filter(|size| *size <= DISK_BYTES_MAX).ok_or_else(|| {
        ConnectError::Unusable(format!("it has more than the {DISK_BYTES_MAX} bytes that are supported"))
    })?;
    // The payload of a page begins at its fourth byte.
    let limit = |at: usize, len: usize| limits.get(at - 4..at - 4 + len).map_or(0, number);
    let blocks_max = |told: u64| match u32::try_from(told) {
        Ok(0) | Err(_) => CLEAR_BLOCKS_MAX,
        Ok(told) => told.min(CLEAR_BLOCKS_MAX),
    };
    let transfer = limit(8, 4).saturating_mul(block_bytes.into());
    let transfer = if transfer == 0 { PIECE_BYTES_MAX.into() } else { transfer };
    // Whole pages of a guest are written by one command, unless the unit takes less than one.
    let transfer = transfer.min(PIECE_BYTES_MAX.into()) / 4096 * 4096;
    let transfer_bytes_max = u32::try_from(transfer.max(4096)).expect("pieces are short");
    let can = provisioning.get(1).copied().unwrap_or_default();
    let (unmaps, same_unmaps) = (can & 0x80 != 0, can & 0x40 != 0);
    let (unmap_max, same_max) = (blocks_max(limit(20, 4)), blocks_max(limit(36, 8)));
    let same = if same_unmaps {
        Some(Clearing { blocks_max: same_max, unmapping: Unmapping::Allowed })
    } else {
        // Only who has a limit for it is known to have the command.
        (limit(36, 8) > 0).then_some(Clearing { blocks_max: same_max, unmapping: Unmapping::No })
    };
    let unmap = unmaps.then_some(Clearing { blocks_max: unmap_max, unmapping: Unmapping::Allowed });
    let is_protected = mode.get(2).is_some_and(|parameter| parameter & 0x80 != 0);
    Ok(Unit {
        size_bytes,
        block_bytes,
        access: if is_protected { Access::ReadOnly } else { Access::ReadWrite },
        transfer_bytes_max,
        same,
        unmap,
        tells_holes: false,
        names: Vec::new(),
    })
}

/// An entry for fuzzers: a unit that says these bytes.
pub(super) fn fuzz(input: &[u8]) {
    let (first, second) = input.split_at(input.len() / 2);
    let _ = is_disk(first);
    let _ = names_of(first);
    let capacity = capacity_16(first).or_else(|_| capacity_10(second));
    let Ok(capacity) = capacity else { return };
    if let Ok(unit) = unit_of(&capacity, payload(first, 0xb0), payload(second, 0xb2), second) {
        assert!(unit.size_bytes <= DISK_BYTES_MAX && unit.transfer_bytes_max <= PIECE_BYTES_MAX);
        assert!(unit.same.is_none_or(|same| same.blocks_max > 0), "clearing makes progress");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Capacity = Capacity { last_block: 99, block_bytes: 512, is_thin: true, zeroes: true };

    fn limits(transfer: u32, unmap: u32, same: u64) -> Vec<u8> {
        let mut page = vec![0; 60];
        page[4..8].copy_from_slice(&transfer.to_be_bytes());
        page[16..20].copy_from_slice(&unmap.to_be_bytes());
        page[32..40].copy_from_slice(&same.to_be_bytes());
        page
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused() {
        for (last_block, block_bytes) in [(99, 520), (99, 8192), (99, 0), (u64::MAX, 512), (1 << 40, 4096)] {
            let capacity = Capacity { last_block, block_bytes, ..SMALL };
            let refused = unit_of(&capacity, &[], &[], &[]);
            assert!(matches!(refused, Err(ConnectError::Unusable(_))), "{capacity:?}: {refused:?}");
        }
        let short = capacity_10(&[0, 0, 0, 9, 0, 0, 16, 0]).unwrap();
        assert_eq!(unit_of(&short, &[], &[], &[]).unwrap().size_bytes, 40960);
        assert!(capacity_10(&[0; 7]).is_err() && capacity_16(&[]).is_err());
    }

    #[test]
    fn transfers_stay_below_what_the_unit_says_and_below_ours() {
        let of = |limits: &[u8]| unit_of(&SMALL, limits, &[], &[]).unwrap().transfer_bytes_max;
        assert_eq!(of(&[]), PIECE_BYTES_MAX);
        assert_eq!(of(&limits(u32::MAX, 0, 0)), PIECE_BYTES_MAX);
        assert_eq!(of(&limits(129, 0, 0)), 64 << 10);
        assert_eq!(of(&limits(1, 0, 0)), 4096);
    }

    #[test]
    fn clearing_is_used_where_the_unit_says_that_it_can() {
        let of = |limits: &[u8], can| unit_of(&SMALL, limits, &[0, can], &[]).unwrap();
        let none = of(&[], 0);
        assert_eq!((none.same, none.unmap), (None, None));
        let both = of(&limits(0, 64, 128), 0xc0);
        assert_eq!(both.same, Some(Clearing { blocks_max: 128, unmapping: Unmapping::Allowed }));
        assert_eq!(both.unmap.unwrap().blocks_max, 64);
        let writes = of(&limits(0, 0, u64::MAX), 0);
        assert_eq!(writes.same, Some(Clearing { blocks_max: CLEAR_BLOCKS_MAX, unmapping: Unmapping::No }));
    }

    #[test]
    fn a_protected_unit_is_read_only() {
        let of = |mode: &[u8]| unit_of(&SMALL, &[], &[], mode).unwrap().access;
        assert_eq!(of(&[3, 0, 0x80, 0]), Access::ReadOnly);
        assert_eq!(of(&[3, 0, 0x10, 0]), Access::ReadWrite);
        assert_eq!(of(&[]), Access::ReadWrite);
    }

    #[test]
    fn a_unit_is_known_by_its_own_names_not_by_those_of_its_ports() {
        let of = |port: u8| names_of(&[1, 3, 0, 2, 7, 8, 0x51, 0x94, 0, 1, port]);
        assert_eq!(of(1), of(2));
        assert_eq!(of(1), Some(vec![3, 2, 7, 8]));
        assert_eq!(names_of(&[1, 3, 0, 9, 7]), None);
        assert_eq!(names_of(&[]), None);
    }
}
