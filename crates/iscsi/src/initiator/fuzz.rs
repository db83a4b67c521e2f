//! An entry for fuzzers: a target that sends these bytes.

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::login::{ALGORITHMS, Agreed, Goal, Login, Step};
use super::session::{Job, Session, Transfer};
use super::{Secrets, scsi, unit};
use crate::chap::Credentials;
use crate::login::Challenge;
use crate::params::Parameters;
use crate::pdu::{Isid, LoginResponse};

/// The first byte chooses what the bytes behind it are: responses to a login, PDUs of a session, or what a
/// logical unit says of itself.
pub(crate) fn target(input: &[u8]) {
    match input.split_first() {
        Some((0..64, rest)) => login(rest),
        Some((64..192, rest)) => session(rest),
        Some((_, rest)) => unit::fuzz(rest),
        None => {}
    }
}

/// Responses to a login that demands a proof: each has its flags, the length of its text, and its text.
fn login(mut input: &[u8]) {
    let own = Credentials::new("user", b"a secret of the fuzzer").ok();
    let theirs = Credentials::new("target", b"another secret of it").ok();
    let goal = Goal {
        initiator: "iqn.fuzz".parse().expect("it is a name"),
        target: None,
        isid: Isid::default(),
        secrets: Secrets { initiator: own, target: theirs },
        digests: "CRC32C,None",
    };
    let (mut login, _, _) = Login::begin(&goal, ALGORITHMS, Challenge { id: 1, bytes: [7; 32] });
    while let &[flags, len, ref rest @ ..] = input {
        let (text, rest) = rest.split_at(usize::from(len).min(rest.len()));
        input = rest;
        match login.feed(&LoginResponse { flags, ..LoginResponse::default() }, text) {
            Ok(Step::Send(_, text)) => assert!(text.len() <= 8192, "a request fits one PDU"),
            Ok(Step::Done(_)) => panic!("nobody is believed who did not prove that he knows the secret"),
            Err(_) => return,
        }
    }
}

/// PDUs of a session with a read and a write under way, whose tags are 0 and 1.
fn session(input: &[u8]) {
    const WANTED_BYTES: u32 = 4096;
    let agreed = Agreed { parameters: Parameters::default(), cmd_sn: 1, max_cmd_sn: 9, exp_stat_sn: 1 };
    let mut session = Session::new(agreed, 0);
    let commands = [scsi::read(0, 8, WANTED_BYTES), scsi::write(0, 64, &[7; 32 << 10])];
    let mut answers = Vec::new();
    for command in commands {
        let (done, answer) = oneshot::channel();
        let wanted = if let Transfer::In(len) = command.transfer { len } else { 0 };
        session.add(Job { command, done, hold: None }, Instant::now());
        answers.push((wanted, answer));
    }
    let mut output = Vec::new();
    session.fill(&mut output);
    let fed = session.feed(input);
    assert!(fed.is_err() || fed.is_ok_and(|used| used <= input.len()), "no more is used than there is");
    session.fill(&mut output);
    // Data is sent only as far as there is some; pings may be answered as often as they come, within a bound.
    assert!(output.len() < 128 << 10, "what is sent is bounded");
    for (wanted, mut answer) in answers {
        if let Ok(Ok(reply)) = answer.try_recv() {
            assert!(reply.data.len() <= wanted as usize, "no more is kept than was asked for");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pdu::{DataIn, Digests, FINAL, Header, NopIn, R2t, Reject, ScsiResponse, seal};
    use proptest::prelude::*;

    /// Bytes that are mostly small, so that tags, offsets and lengths are often nearly right.
    fn small() -> impl Strategy<Value = u8> {
        prop_oneof![4 => Just(0u8), 2 => 0u8..4, 1 => any::<u8>()]
    }

    const OPCODES: [u8; 5] =
        [DataIn::OPCODE, ScsiResponse::OPCODE, R2t::OPCODE, NopIn::OPCODE, Reject::OPCODE];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn no_session_makes_the_initiator_panic(
            pdus in prop::collection::vec(
                (0..OPCODES.len(), prop::collection::vec(small(), 47), prop::collection::vec(small(), 0..80)),
                0..6,
            ),
        ) {
            let mut input = vec![64];
            for (opcode, rest, data) in &pdus {
                let mut bytes = [0; 48];
                bytes[0] = OPCODES[*opcode];
                bytes[1..].copy_from_slice(rest);
                bytes[1] |= FINAL;
                bytes[4] = 0;
                let seal = seal(Header(bytes), data, Digests::default());
                input.extend_from_slice(&[seal.head(), data, seal.tail()].concat());
            }
            target(&input);
        }

        #[test]
        fn no_target_is_believed_without_its_secret(
            steps in prop::collection::vec((any::<u8>(), 0usize..6, prop::collection::vec(small(), 0..20)), 0..6),
        ) {
            let texts: [&[u8]; 5] = [
                b"AuthMethod=CHAP\0",
                b"AuthMethod=None\0",
                b"CHAP_A=7\0CHAP_I=3\0CHAP_C=0x0102030405060708\0",
                b"CHAP_N=target\0CHAP_R=0x00\0",
                b"MaxBurstLength=512\0FirstBurstLength=16777215\0HeaderDigest=CRC32C\0",
            ];
            let mut input = vec![0];
            for (flags, known, random) in &steps {
                let text = texts.get(*known).copied().unwrap_or(random);
                // Often the flags that are expected: on to the operational stage, or staying.
                let flags = match *flags % 4 { 0 => 0x81, 1 | 2 => 0, _ => *flags };
                input.extend_from_slice(&[flags, text.len() as u8]);
                input.extend_from_slice(text);
            }
            target(&input);
        }

        #[test]
        fn nothing_that_a_unit_says_makes_the_initiator_panic(bytes in prop::collection::vec(small(), 0..200)) {
            target(&[&[192][..], &bytes].concat());
        }
    }
}
