//! Entries for fuzzers: each throws foreign bytes at one parser. None may panic, whatever comes.

use std::sync::Arc;

use block::{Access, BoxFuture, Disk, DiskError, Extent};
use tokio::sync::oneshot;

use crate::client::handshake::{Handshake, Progress, WantTls};
use crate::client::pending::{Job, Pending};
use crate::export::{Export, Exports, Listing};
use crate::negotiate::{Event, Negotiation, Tls};
use crate::proto::Framing;
use crate::request::{self, Command};

/// A client that negotiates with these bytes. The first chooses the state of TLS.
pub fn negotiation(input: &[u8]) {
    let Some((&mode, mut input)) = input.split_first() else { return };
    let mut negotiation = Negotiation::new(if mode & 1 == 0 { Tls::Off } else { Tls::Required });
    let mut out = Vec::new();
    while let Ok((used, event)) = negotiation.feed(input, &OneEmptyDisk, &mut out) {
        assert!(used <= input.len(), "no more is used than there is");
        input = &input[used..];
        match event {
            Event::StartTls => negotiation.tls_is_up(),
            Event::Continue => {}
            Event::Incomplete | Event::Abort | Event::Transmission(_) => break,
        }
    }
}

/// A client that sends these bytes as requests. The first chooses the framing.
pub fn requests(input: &[u8]) {
    let Some((&mode, mut input)) = input.split_first() else { return };
    let framing = framing(mode);
    while let Ok(Some(request)) = request::parse(framing, input) {
        let len = request.payload_bytes(framing).saturating_add(request::head_bytes(framing) as u64);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let Some(rest) = input.get(len..) else { break };
        input = rest;
    }
}

/// A server that negotiates with these bytes. The first chooses whether TLS is wanted.
pub fn handshake(input: &[u8]) {
    let Some((&mode, mut input)) = input.split_first() else { return };
    let mut handshake = Handshake::new("disk", if mode & 1 == 0 { WantTls::No } else { WantTls::Yes });
    let mut out = Vec::new();
    while let Ok((used, progress)) = handshake.feed(input, &mut out) {
        assert!(used <= input.len(), "no more is used than there is");
        input = &input[used..];
        match progress {
            Progress::StartTls => handshake.tls_is_up(&mut out),
            Progress::Continue => {}
            Progress::Incomplete | Progress::Done(_) => break,
        }
    }
}

/// A server that sends these bytes as replies. The first chooses the framing, the second the size of the
/// pieces that they arrive in.
pub fn replies(input: &[u8]) {
    let &[mode, piece, ref input @ ..] = input else { return };
    let mut pending = Pending::new();
    pending.restart(framing(mode), Some(1));
    let mut waiting = Vec::new();
    // Cookies 1 to 4 are under way.
    for command in [Command::Read, Command::Write, Command::BlockStatus, Command::Flush] {
        let (done, answer) = oneshot::channel();
        waiting.push(answer);
        pending.add(Job { command, flags: 0, offset: 4096, len: 64, payload: [0; 64].to_vec().into(), done });
    }
    let mut arrived = Vec::new();
    for piece in input.chunks(usize::from(piece) + 1) {
        arrived.extend_from_slice(piece);
        match pending.feed(&arrived) {
            Ok(used) => drop(arrived.drain(..used)),
            Err(_) => return,
        }
    }
}

fn framing(mode: u8) -> Framing {
    [Framing::Simple, Framing::Structured, Framing::Extended][usize::from(mode % 3)]
}

struct OneEmptyDisk;

impl Exports for OneEmptyDisk {
    fn open(&self, name: &str) -> Option<Export> {
        (name.len() < 8).then(|| Export { description: name.to_owned(), ..Export::new(Arc::new(EmptyDisk)) })
    }

    fn list(&self) -> Vec<Listing> {
        vec![Listing { name: "disk".to_owned(), description: String::new() }]
    }
}

struct EmptyDisk;

impl Disk for EmptyDisk {
    fn size_bytes(&self) -> u64 {
        0
    }

    fn access(&self) -> Access {
        Access::ReadOnly
    }

    fn read<'a>(&'a self, _: u64, _: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async { Ok(()) })
    }

    fn write<'a>(&'a self, _: u64, _: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async { Err(DiskError::ReadOnly) })
    }

    fn write_zeroes(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async { Err(DiskError::ReadOnly) })
    }

    fn discard(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async { Err(DiskError::ReadOnly) })
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async { Ok(()) })
    }

    fn extents(&self, _: u64, _: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{
        EXTENDED_REPLY_MAGIC, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, SIMPLE_REPLY_MAGIC,
        STRUCTURED_REPLY_MAGIC,
    };
    use proptest::prelude::*;

    /// Payloads whose fields are mostly small, so that lengths and counts are often nearly right.
    fn payload() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(prop_oneof![3 => Just(0u8), 2 => 0u8..20, 1 => any::<u8>()], 0..60)
    }

    fn client_options() -> impl Strategy<Value = Vec<u8>> {
        let one = (0u32..14, payload()).prop_map(|(option, data)| {
            let len = (data.len() as u32).to_be_bytes();
            [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &len, &data].concat()
        });
        prop::collection::vec(one, 0..6).prop_map(|all| all.concat())
    }

    fn server_options() -> impl Strategy<Value = Vec<u8>> {
        let kind = prop_oneof![0u32..5, (1u32..12).prop_map(|n| n | 1 << 31)];
        let option = prop::sample::select(vec![5u32, 11, 8, 10, 7]);
        let one = (option, kind, payload()).prop_map(|(option, kind, data)| {
            let head = [option, kind, data.len() as u32].map(u32::to_be_bytes).concat();
            [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &head, &data].concat()
        });
        prop::collection::vec(one, 0..8).prop_map(|all| all.concat())
    }

    fn server_replies() -> impl Strategy<Value = Vec<u8>> {
        let kind = prop::sample::select(vec![0u16, 1, 2, 5, 6, 7, 0x8001, 0x8002]);
        let one = (0usize..3, 0u16..2, kind, 0u64..6, payload(), 4080u64..4200).prop_map(
            |(form, flags, kind, cookie, mut data, offset)| {
                if (1..3).contains(&kind) && data.len() >= 8 {
                    data[..8].copy_from_slice(&offset.to_be_bytes());
                }
                let (flags, kind) = (flags.to_be_bytes(), kind.to_be_bytes());
                let (cookie, len) = (cookie.to_be_bytes(), data.len() as u32);
                match form {
                    0 => [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &[0; 4], &cookie, &data].concat(),
                    1 => {
                        let head = [&STRUCTURED_REPLY_MAGIC.to_be_bytes()[..], &flags, &kind, &cookie];
                        [&head.concat()[..], &len.to_be_bytes(), &data].concat()
                    }
                    _ => {
                        let head = [&EXTENDED_REPLY_MAGIC.to_be_bytes()[..], &flags, &kind, &cookie];
                        let len = u64::from(len).to_be_bytes();
                        [&head.concat()[..], &[0; 8], &len, &data].concat()
                    }
                }
            },
        );
        prop::collection::vec(one, 0..6).prop_map(|all| all.concat())
    }

    proptest! {
        #[test]
        fn no_client_makes_the_negotiation_panic(
            mode: u8, options in client_options(), random: Vec<u8>,
        ) {
            negotiation(&[&[mode, 0, 0, 0, 3][..], &options].concat());
            negotiation(&[&[mode, 0, 0, 0, 3][..], &random].concat());
        }

        #[test]
        fn no_client_makes_the_requests_panic(mode: u8, random: Vec<u8>) {
            requests(&[&[mode][..], &random].concat());
        }

        #[test]
        fn no_server_makes_the_handshake_panic(mode: u8, replies in server_options(), random: Vec<u8>) {
            let greeting = [&INIT_MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &[0, 3]].concat();
            handshake(&[&[mode][..], &greeting, &replies].concat());
            handshake(&[&[mode][..], &random].concat());
        }

        #[test]
        fn no_server_makes_the_replies_panic(mode: u8, piece: u8, input in server_replies()) {
            replies(&[&[mode, piece][..], &input].concat());
        }
    }
}
