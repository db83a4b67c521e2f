//! Entries for fuzzers: each throws foreign bytes at one parser. None may panic, whatever comes.

use std::sync::Arc;

use block::{Access, BoxFuture, Disk, DiskError, Extent, TryIo};

use crate::chap::Credentials;
use crate::login::{Admission, Challenge, Directory, Login, Refusal, Step};
use crate::name::IscsiName;
use crate::pdu::{
    Cdb, DataOut, Digest, Digests, HEADER_BYTES, Isid, LoginRequest, LogoutRequest, NopOut, ScsiCommand,
    TaskRequest, TextRequest, frame,
};
use crate::scsi::{Begin, Device, Identity, InitiatorPort, Nexus, NexusId, TargetPort, Unit};

/// A stream of PDUs. The first byte chooses the digests.
pub fn pdus(input: &[u8]) {
    const DATA_BYTES_MAX: usize = 1 << 12;
    let Some((&mode, mut input)) = input.split_first() else { return };
    let digest = |bit| if mode & bit == 0 { Digest::None } else { Digest::Crc32c };
    let digests = Digests { header: digest(1), data: digest(2) };
    while let Ok(Some(pdu)) = frame(input, digests, DATA_BYTES_MAX) {
        assert!(pdu.bytes >= HEADER_BYTES && pdu.bytes <= input.len(), "no more is used than there is");
        assert!(pdu.data.len() <= DATA_BYTES_MAX, "no more is taken than was agreed");
        let header = &pdu.header;
        let again = match header.opcode() {
            NopOut::OPCODE => NopOut::parse(header).header(),
            ScsiCommand::OPCODE => ScsiCommand::parse(header).header(),
            TaskRequest::OPCODE => TaskRequest::parse(header).header(),
            LoginRequest::OPCODE => LoginRequest::parse(header).header(),
            TextRequest::OPCODE => TextRequest::parse(header).header(),
            DataOut::OPCODE => DataOut::parse(header).header(),
            LogoutRequest::OPCODE => LogoutRequest::parse(header).header(),
            _ => *header,
        };
        assert_eq!(again.task_tag(), header.task_tag(), "what was parsed is written again");
        input = &input[pdu.bytes..];
    }
}

/// An initiator that logs in with these bytes. The first chooses whether CHAP is wanted; then each request
/// has its flags, the length of its text, and its text.
pub fn login(input: &[u8]) {
    let Some((&mode, mut input)) = input.split_first() else { return };
    let mut login = Login::new(Challenge { id: 1, bytes: [7; 32] }, 1, 1);
    while let &[flags, len, ref rest @ ..] = input {
        let (text, rest) = rest.split_at(usize::from(len).min(rest.len()));
        input = rest;
        let request = LoginRequest { flags, ..LoginRequest::default() };
        let (_, _, step) = login.feed(&request, text, &Doors { asks: mode & 1 == 1 });
        match step {
            Step::Continue => {}
            Step::Done(agreed) => {
                assert!(mode & 1 == 0, "nobody is let in without the secret");
                let longest = agreed.parameters.first_burst_bytes_max;
                assert!(longest <= crate::limits::FIRST_BURST_BYTES_MAX, "unsolicited data is bounded");
                return;
            }
            Step::Refused(_) => return,
        }
    }
}

/// An initiator that sends these bytes as SCSI commands, 16 each, followed by their data.
pub fn commands(input: &[u8]) {
    let unit = Unit::new(Arc::new(SmallDisk), Identity { serial: "fuzz".to_owned() });
    let device = Device::new(vec![Arc::new(unit)]);
    let target = TargetPort { name: "iqn.fuzz".to_owned(), group: 1, groups: vec![1] };
    let initiator = InitiatorPort { name: "iqn.fuzzer".to_owned(), isid: Isid([1; 6]) };
    let nexus = Nexus { id: NexusId(1), initiator, target: Arc::new(target) };
    device.attach(&nexus, |_| Arc::new(|_| Box::pin(async {})));
    let mut input = input;
    while let Some((cdb, rest)) = input.split_first_chunk::<16>() {
        let cdb: Cdb = *cdb;
        input = rest;
        let Begin::Work(work) = device.begin(&nexus, 0, &cdb) else { continue };
        let Some(unit) = device.unit(0) else { return };
        if work.is_read() {
            assert!(work.read_bytes <= crate::limits::TRANSFER_BYTES_MAX, "reads are bounded");
            continue;
        }
        let (data, rest) = rest.split_at((work.data_out_bytes as usize).min(rest.len()));
        input = rest;
        // The disk below never waits, so that one poll has to do.
        let mut running = std::pin::pin!(unit.run(&nexus, &work, data));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(running.as_mut().poll(&mut context).is_ready(), "nothing waits for anything");
    }
}

/// A target that sends these bytes to an initiator of ours.
pub fn target(input: &[u8]) {
    crate::initiator::fuzz::target(input);
}

/// An initiator that sends any PDUs in the full feature phase, between which its disk answers and its replies are
/// taken, or not. The first byte chooses whether the disk always has to wait.
pub fn session(input: &[u8]) {
    let Some((&mode, steps)) = input.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("it needs no descriptors");
    let disk: Arc<dyn Disk> =
        if mode & 1 == 0 { Arc::new(SmallDisk) } else { Arc::new(QuickDisk(SmallDisk)) };
    runtime.block_on(crate::target::fuzz::session(disk, steps));
}

struct Doors {
    asks: bool,
}

impl Directory for Doors {
    fn discovery(&self, _: &IscsiName) -> Result<Admission, Refusal> {
        let credentials = Credentials::new("user", b"a secret of the fuzzer").ok();
        Ok(Admission { initiator: credentials.filter(|_| self.asks), ..Admission::default() })
    }

    fn target(&self, initiator: &IscsiName, target: &IscsiName) -> Result<Admission, Refusal> {
        if target.as_str().ends_with('x') { Err(Refusal::Unknown) } else { self.discovery(initiator) }
    }
}

/// A disk of 64 KiB that keeps nothing.
struct SmallDisk;

impl SmallDisk {
    fn check(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.size_bytes());
        assert!(fits, "what begins lies on the disk");
        Ok(())
    }
}

impl Disk for SmallDisk {
    fn size_bytes(&self) -> u64 {
        64 << 10
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        buf.fill(0);
        Box::pin(async move { self.check(offset, buf.len() as u64) })
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async move { self.check(offset, data.len() as u64) })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async move { self.check(offset, len) })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async move { self.check(offset, len) })
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async { Ok(()) })
    }

    fn extents(&self, _: u64, _: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

/// The same disk, which never has to wait for reads and writes.
struct QuickDisk(SmallDisk);

impl Disk for QuickDisk {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn access(&self) -> Access {
        self.0.access()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<TryIo, DiskError> {
        buf.fill(0);
        self.0.check(offset, buf.len() as u64).map(|()| TryIo::Done)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<TryIo, DiskError> {
        self.0.check(offset, data.len() as u64).map(|()| TryIo::Done)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.0.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.0.write(offset, data)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.0.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.0.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        self.0.flush()
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        self.0.extents(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::OPERATION_CODES;
    use proptest::prelude::*;

    /// Bytes that are mostly small, so that lengths and addresses are often nearly right.
    fn small() -> impl Strategy<Value = u8> {
        prop_oneof![3 => Just(0u8), 2 => 0u8..20, 1 => any::<u8>()]
    }

    proptest! {
        #[test]
        fn no_stream_makes_the_frames_panic(
            mode: u8, mut input in prop::collection::vec(small(), 0..300), opcode in 0u8..7,
        ) {
            if let Some(first) = input.first_mut() {
                *first = opcode;
            }
            pdus(&[&[mode][..], &input].concat());
        }

        #[test]
        fn no_initiator_is_let_in_without_the_secret(
            mode: u8,
            steps in prop::collection::vec((any::<u8>(), 0usize..6, prop::collection::vec(small(), 0..20)), 0..6),
        ) {
            let texts: [&[u8]; 5] = [
                b"InitiatorName=iqn.a\0SessionType=Discovery\0AuthMethod=CHAP,None\0",
                b"InitiatorName=iqn.a\0TargetName=iqn.b\0AuthMethod=None\0",
                b"CHAP_A=5,7\0",
                b"CHAP_N=user\0CHAP_R=0x00\0CHAP_I=1\0CHAP_C=0x0102\0",
                b"MaxBurstLength=512\0FirstBurstLength=16777215\0HeaderDigest=CRC32C\0",
            ];
            let mut input = vec![mode];
            for (flags, known, random) in &steps {
                let text = texts.get(*known).copied().unwrap_or(random);
                input.extend_from_slice(&[*flags, text.len() as u8]);
                input.extend_from_slice(text);
            }
            login(&input);
        }

        #[test]
        fn no_initiator_makes_a_session_panic_or_hold_more_than_it_may(
            mode: u8, steps in prop::collection::vec(prop::collection::vec(small(), 10), 0..80),
        ) {
            session(&[&[mode][..], &steps.concat()].concat());
        }

        #[test]
        fn no_command_makes_the_disk_panic(
            all in prop::collection::vec(
                (0..OPERATION_CODES.len(), prop::collection::vec(small(), 15), prop::collection::vec(small(), 0..64)),
                0..8,
            ),
        ) {
            let commands_of = all.iter().map(|(code, rest, data)| [&[OPERATION_CODES[*code]], &rest[..], data].concat());
            commands(&commands_of.collect::<Vec<_>>().concat());
        }
    }
}
