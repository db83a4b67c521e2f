//! INQUIRY (SPC-4 §6.6) and its vital product data pages (SPC-4 §7.8, SBC-3 §6.6).

use sha2::{Digest, Sha256};

use super::nexus::{Identity, Nexus};
use super::sense::Sense;
use super::{LOGICAL_BLOCK_BYTES, PHYSICAL_BLOCK_EXPONENT, number, truncated};
use crate::limits::{
    CLEAR_BLOCKS_MAX, COMPARE_AND_WRITE_BLOCKS_MAX, TRANSFER_BYTES_MAX, UNMAP_DESCRIPTORS_MAX,
};
use crate::pdu::Cdb;

/// Our name as a vendor, eight characters.
const VENDOR: &[u8; 8] = b"VIRTMAN ";

/// Byte 0 of a unit that is not there: no peripheral device type.
const ABSENT: u8 = 0x7f;

/// The one target port group, of all ports: each reaches the disk as well as any other.
pub(super) const PORT_GROUP: u16 = 1;

/// The pages, in ascending order.
const PAGES: [u8; 7] = [0x00, 0x80, 0x83, 0x86, 0xb0, 0xb1, 0xb2];

/// Most bytes of a page that are ever allocated for: what the command's field holds.
fn allocation(cdb: &Cdb) -> u64 {
    number(&cdb[3..5])
}

/// INQUIRY of a unit that is there.
pub(super) fn inquiry(cdb: &Cdb, identity: &Identity, nexus: &Nexus) -> Result<Vec<u8>, Sense> {
    let pages = cdb[1] & 1 != 0;
    let data = match (pages, cdb[2]) {
        (false, 0) => standard(0),
        (false, _) => return Err(Sense::in_command(2)),
        (true, 0x00) => page(0x00, &PAGES),
        (true, 0x80) => page(0x80, identity.serial.as_bytes()),
        (true, 0x83) => page(0x83, &designators(identity, nexus)),
        (true, 0x86) => extended(),
        (true, 0xb0) => block_limits(),
        (true, 0xb1) => characteristics(),
        (true, 0xb2) => provisioning(),
        (true, _) => return Err(Sense::in_command(2)),
    };
    Ok(truncated(data, allocation(cdb)))
}

/// INQUIRY of a unit that is not there.
pub(super) fn absent(cdb: &Cdb) -> Result<Vec<u8>, Sense> {
    match (cdb[1] & 1, cdb[2]) {
        (0, 0) => Ok(truncated(standard(ABSENT), allocation(cdb))),
        (1, 0) => {
            let mut data = page(0x00, &[0x00]);
            data[0] = ABSENT;
            Ok(truncated(data, allocation(cdb)))
        }
        _ => Err(Sense::in_command(2)),
    }
}

fn standard(kind: u8) -> Vec<u8> {
    const SPC_4: u8 = 6;
    const HIERARCHICAL_LUNS_AND_FORMAT: u8 = 0x12;
    const IMPLICIT_ASYMMETRIC_ACCESS: u8 = 0x10;
    const MULTIPLE_PORTS: u8 = 0x10;
    const COMMAND_QUEUE: u8 = 0x02;
    // SAM-5, SPC-4, SBC-3, iSCSI.
    const VERSIONS: [u16; 4] = [0x00a0, 0x0460, 0x04c0, 0x0960];
    let mut data = vec![0; 96];
    data[..8].copy_from_slice(&[
        kind,
        0,
        SPC_4,
        HIERARCHICAL_LUNS_AND_FORMAT,
        91,
        IMPLICIT_ASYMMETRIC_ACCESS,
        MULTIPLE_PORTS,
        COMMAND_QUEUE,
    ]);
    data[8..16].copy_from_slice(VENDOR);
    data[16..32].copy_from_slice(b"DISK            ");
    data[32..36].copy_from_slice(b"1   ");
    for (i, version) in VERSIONS.into_iter().enumerate() {
        data[58 + 2 * i..60 + 2 * i].copy_from_slice(&version.to_be_bytes());
    }
    data
}

fn page(code: u8, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(payload.len()).expect("pages are short: names are bounded");
    let mut data = vec![0, code];
    data.extend_from_slice(&len.to_be_bytes());
    data.extend_from_slice(payload);
    data
}

/// A page of 64 bytes, most of them zeroes.
fn long_page(code: u8) -> Vec<u8> {
    page(code, &[0; 60])
}

/// Device identification: the unit by two names, the port by three.
fn designators(identity: &Identity, nexus: &Nexus) -> Vec<u8> {
    const BINARY: u8 = 1;
    const ASCII: u8 = 2;
    const UTF8: u8 = 3;
    const VENDOR_ID: u8 = 1;
    const NAA: u8 = 3;
    const RELATIVE_PORT: u8 = 4;
    const GROUP: u8 = 5;
    const NAME: u8 = 8;
    const OF_PORT: u8 = 0x10;
    const ISCSI: u8 = 0x50;
    const WITH_PROTOCOL: u8 = 0x80;
    let mut out = Vec::new();
    let mut add = |set: u8, kind: u8, value: &[u8]| {
        let of_port = kind & OF_PORT != 0;
        let (protocol, with) = if of_port { (ISCSI, WITH_PROTOCOL) } else { (0, 0) };
        let len = u8::try_from(value.len()).expect("designators are short: names are bounded");
        out.extend_from_slice(&[protocol | set, with | kind, 0, len]);
        out.extend_from_slice(value);
    };
    add(BINARY, NAA, &naa(&identity.serial));
    add(ASCII, VENDOR_ID, &[&VENDOR[..], identity.serial.as_bytes()].concat());
    add(BINARY, OF_PORT | RELATIVE_PORT, &[&[0, 0][..], &nexus.target.group.to_be_bytes()].concat());
    add(BINARY, OF_PORT | GROUP, &[&[0, 0][..], &PORT_GROUP.to_be_bytes()].concat());
    // SPC-4 §7.8.6.10: closed by a zero byte and filled up to a multiple of four.
    let mut name = format!("{},t,0x{:04x}\0", nexus.target.name, nexus.target.group).into_bytes();
    name.resize(name.len().next_multiple_of(4), 0);
    add(UTF8, OF_PORT | NAME, &name);
    out
}

/// A locally assigned name (SPC-4 §7.8.6.6.4) that the serial number alone decides.
fn naa(serial: &str) -> [u8; 8] {
    const LOCALLY_ASSIGNED: u8 = 0x30;
    let hash = Sha256::digest(serial.as_bytes());
    let mut name: [u8; 8] = *hash.first_chunk().expect("a hash has 32 bytes");
    name[0] = LOCALLY_ASSIGNED | (name[0] & 0x0f);
    name
}

/// Extended INQUIRY data: all task attributes, and a volatile cache.
fn extended() -> Vec<u8> {
    const SIMPLE_ORDERED_HEAD: u8 = 0x07;
    const VOLATILE_CACHE: u8 = 0x01;
    let mut data = long_page(0x86);
    data[5] = SIMPLE_ORDERED_HEAD;
    data[6] = VOLATILE_CACHE;
    data
}

fn block_limits() -> Vec<u8> {
    const WRITE_SAME_NEEDS_A_LENGTH: u8 = 1;
    const ALIGNMENT_IS_VALID: u8 = 0x80;
    const OPTIMAL_TRANSFER_BYTES: u32 = 1 << 20;
    let blocks_max = TRANSFER_BYTES_MAX / LOGICAL_BLOCK_BYTES;
    let granularity = 1u32 << PHYSICAL_BLOCK_EXPONENT;
    let mut data = long_page(0xb0);
    data[4] = WRITE_SAME_NEEDS_A_LENGTH;
    data[5] = COMPARE_AND_WRITE_BLOCKS_MAX;
    data[7] = 1 << PHYSICAL_BLOCK_EXPONENT;
    let optimal = OPTIMAL_TRANSFER_BYTES / LOGICAL_BLOCK_BYTES;
    let numbers = [blocks_max, optimal, blocks_max, CLEAR_BLOCKS_MAX, UNMAP_DESCRIPTORS_MAX, granularity];
    for (i, number) in numbers.into_iter().enumerate() {
        data[8 + 4 * i..12 + 4 * i].copy_from_slice(&number.to_be_bytes());
    }
    data[32] = ALIGNMENT_IS_VALID;
    data[36..44].copy_from_slice(&u64::from(CLEAR_BLOCKS_MAX).to_be_bytes());
    data
}

fn characteristics() -> Vec<u8> {
    const DOES_NOT_ROTATE: u8 = 1;
    let mut data = long_page(0xb1);
    data[5] = DOES_NOT_ROTATE;
    data
}

/// Thin provisioning: UNMAP and both forms of WRITE SAME give space back, which reads as zeroes.
fn provisioning() -> Vec<u8> {
    const UNMAP_AND_WRITE_SAME_AND_ZEROES: u8 = 0xe4;
    const THIN: u8 = 2;
    page(0xb2, &[0, UNMAP_AND_WRITE_SAME_AND_ZEROES, THIN, 0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::unit::tests::nexus;

    fn ask(page: Option<u8>, len: u8) -> Result<Vec<u8>, Sense> {
        let mut cdb = [0; 16];
        cdb[..5].copy_from_slice(&[0x12, u8::from(page.is_some()), page.unwrap_or(0), 0, len]);
        inquiry(&cdb, &Identity { serial: "vm-1".to_owned() }, &nexus(1))
    }

    #[test]
    fn every_page_that_is_listed_is_there_and_says_its_length() {
        for code in ask(Some(0), 255).unwrap()[4..].to_vec() {
            let page = ask(Some(code), 255).unwrap();
            assert_eq!(page[1], code);
            assert_eq!(number(&page[2..4]) as usize, page.len() - 4, "page {code:#x}");
        }
        assert_eq!(ask(Some(0x84), 255), Err(Sense::in_command(2)));
    }

    #[test]
    fn no_more_is_told_than_there_is_room_for() {
        assert_eq!(ask(None, 5).unwrap(), [0, 0, 6, 0x12, 91]);
        assert_eq!(ask(Some(0x80), 0).unwrap(), []);
        assert_eq!(ask(None, 255).unwrap().len(), 96);
    }

    #[test]
    fn the_same_serial_number_has_the_same_name_everywhere() {
        assert_eq!(naa("vm-1"), naa("vm-1"));
        assert_ne!(naa("vm-1"), naa("vm-2"));
        assert_eq!(naa("vm-1")[0] >> 4, 3);
    }
}
