//! The operational keys (RFC 7143 §13): what a side offers, and what two offers come to.
//!
//! Both sides keep a [`Parameters`]. The one that answers calls [`Parameters::answer`] for each key; the one
//! that asked applies the answers with [`Parameters::conclude`]. Keys of security and of naming are not here.

use crate::limits::{BURST_BYTES_MAX, COMMANDS_MAX, FIRST_BURST_BYTES_MAX, R2T_MAX, SEGMENT_BYTES_MAX};
use crate::pdu::{Digest, Digests};
use crate::text;

/// Smallest length that a key of lengths may say, in bytes (RFC 7143 §13.12).
const LENGTH_BYTES_MIN: u32 = 512;

/// Largest one: what 24 bits hold.
const LENGTH_BYTES_MAX: u32 = (1 << 24) - 1;

/// What the two sides of a session agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameters {
    /// Digests from the full feature phase on.
    pub digests: Digests,
    /// Longest data segment in bytes that the *other* side takes.
    pub peer_segment_bytes_max: u32,
    /// Whether every transfer to the target waits for an R2T.
    pub initial_r2t: bool,
    /// Whether commands may carry data.
    pub immediate_data: bool,
    /// Longest burst of solicited data in bytes.
    pub burst_bytes_max: u32,
    /// Longest unsolicited data of a command in bytes.
    pub first_burst_bytes_max: u32,
    /// R2Ts of one command under way.
    pub r2t_max: u32,
}

/// An answer to a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// This value is sent back.
    Value(String),
    /// It was a declaration, which has no answer.
    None,
    /// The key is none of these.
    Unknown,
}

/// The other side broke the rules of negotiation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{value}' is not an answer to the key {key}")]
pub struct WrongAnswer {
    /// The key.
    pub key: String,
    /// What was said.
    pub value: String,
}

impl Default for Parameters {
    /// What holds if no key was exchanged.
    fn default() -> Parameters {
        Parameters {
            digests: Digests::default(),
            peer_segment_bytes_max: 8192,
            initial_r2t: true,
            immediate_data: true,
            burst_bytes_max: 256 << 10,
            first_burst_bytes_max: 64 << 10,
            r2t_max: 1,
        }
    }
}

impl Parameters {
    /// Answers an operational key and takes over what it comes to.
    pub fn answer(&mut self, key: &str, value: &str) -> Answer {
        let answer = match key {
            "HeaderDigest" => first_known(value).map(|digest| {
                self.digests.header = digest;
                digest.name().to_owned()
            }),
            "DataDigest" => first_known(value).map(|digest| {
                self.digests.data = digest;
                digest.name().to_owned()
            }),
            "MaxRecvDataSegmentLength" => {
                let Some(len) = length(value) else { return Answer::Value("Reject".to_owned()) };
                self.peer_segment_bytes_max = len;
                return Answer::None;
            }
            "InitialR2T" => yes_or_no(value).map(|wanted| {
                self.initial_r2t = wanted;
                name_of(wanted)
            }),
            "ImmediateData" => yes_or_no(value).map(|wanted| {
                self.immediate_data = wanted;
                name_of(wanted)
            }),
            "MaxBurstLength" => length(value).map(|len| {
                self.burst_bytes_max = len.min(BURST_BYTES_MAX);
                self.burst_bytes_max.to_string()
            }),
            "FirstBurstLength" => length(value).map(|len| {
                self.first_burst_bytes_max = len.min(FIRST_BURST_BYTES_MAX);
                self.first_burst_bytes_max.to_string()
            }),
            "MaxOutstandingR2T" => text::number(value).filter(|n| (1..=65535).contains(n)).map(|n| {
                self.r2t_max = n.min(R2T_MAX);
                self.r2t_max.to_string()
            }),
            "MaxConnections" => text::number(value).map(|_| "1".to_owned()),
            "ErrorRecoveryLevel" => text::number(value).map(|_| "0".to_owned()),
            // The larger of both, and ours is the default.
            "DefaultTime2Wait" => text::number(value).map(|n| n.clamp(2, 3600).to_string()),
            // The smaller of both: a session is not retained once its connection ended.
            "DefaultTime2Retain" => text::number(value).map(|_| "0".to_owned()),
            "DataPDUInOrder" | "DataSequenceInOrder" => yes_or_no(value).map(|_| name_of(true)),
            "IFMarker" | "OFMarker" => yes_or_no(value).map(|_| name_of(false)),
            "IFMarkInt" | "OFMarkInt" => Some("Irrelevant".to_owned()),
            "iSCSIProtocolLevel" => text::number(value).map(|n| n.min(1).to_string()),
            "TaskReporting" => value.split(',').any(|v| v == "RFC3720").then(|| "RFC3720".to_owned()),
            _ => return Answer::Unknown,
        };
        Answer::Value(answer.unwrap_or_else(|| "Reject".to_owned()))
    }

    /// Takes over the answer to a key that we offered with [`offer`]. Keys that are not here are left alone.
    pub fn conclude(&mut self, key: &str, value: &str) -> Result<(), WrongAnswer> {
        let wrong = || WrongAnswer { key: key.to_owned(), value: value.to_owned() };
        match key {
            "HeaderDigest" => self.digests.header = digest(value).ok_or_else(wrong)?,
            "DataDigest" => self.digests.data = digest(value).ok_or_else(wrong)?,
            "MaxRecvDataSegmentLength" => self.peer_segment_bytes_max = length(value).ok_or_else(wrong)?,
            "InitialR2T" => self.initial_r2t = yes_or_no(value).ok_or_else(wrong)?,
            "ImmediateData" => self.immediate_data = yes_or_no(value).ok_or_else(wrong)?,
            "MaxBurstLength" => self.burst_bytes_max = length(value).ok_or_else(wrong)?,
            "FirstBurstLength" => self.first_burst_bytes_max = length(value).ok_or_else(wrong)?,
            "MaxOutstandingR2T" => {
                let count = text::number(value).filter(|n| (1..=COMMANDS_MAX).contains(n));
                self.r2t_max = count.ok_or_else(wrong)?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// Appends what an initiator offers to a text: digests in order of preference, and the lengths of
/// [`limits`](crate::limits).
pub fn offer(out: &mut Vec<u8>, digests: &str) {
    text::push(out, "HeaderDigest", digests);
    text::push(out, "DataDigest", digests);
    text::push(out, "MaxRecvDataSegmentLength", &SEGMENT_BYTES_MAX.to_string());
    text::push(out, "InitialR2T", "No");
    text::push(out, "ImmediateData", "Yes");
    text::push(out, "MaxBurstLength", &BURST_BYTES_MAX.to_string());
    text::push(out, "FirstBurstLength", &FIRST_BURST_BYTES_MAX.to_string());
    text::push(out, "MaxOutstandingR2T", &R2T_MAX.to_string());
    for (key, value) in [
        ("MaxConnections", "1"),
        ("ErrorRecoveryLevel", "0"),
        ("DefaultTime2Wait", "2"),
        ("DefaultTime2Retain", "0"),
        ("DataPDUInOrder", "Yes"),
        ("DataSequenceInOrder", "Yes"),
    ] {
        text::push(out, key, value);
    }
}

fn digest(value: &str) -> Option<Digest> {
    [Digest::None, Digest::Crc32c].into_iter().find(|digest| digest.name() == value)
}

fn first_known(list: &str) -> Option<Digest> {
    list.split(',').find_map(digest)
}

fn length(value: &str) -> Option<u32> {
    text::number(value).filter(|len| (LENGTH_BYTES_MIN..=LENGTH_BYTES_MAX).contains(len))
}

fn yes_or_no(value: &str) -> Option<bool> {
    match value {
        "Yes" => Some(true),
        "No" => Some(false),
        _ => None,
    }
}

fn name_of(value: bool) -> String {
    if value { "Yes".to_owned() } else { "No".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn value(text: &str) -> Answer {
        Answer::Value(text.to_owned())
    }

    #[test]
    fn the_first_digest_that_is_known_is_chosen() {
        let mut parameters = Parameters::default();
        assert_eq!(parameters.answer("HeaderDigest", "CRC9,CRC32C,None"), value("CRC32C"));
        assert_eq!(parameters.answer("DataDigest", "None,CRC32C"), value("None"));
        assert_eq!(parameters.digests, Digests { header: Digest::Crc32c, data: Digest::None });
        assert_eq!(parameters.answer("DataDigest", "CRC9"), value("Reject"));
    }

    #[test]
    fn lengths_never_exceed_what_either_side_takes() {
        let mut parameters = Parameters::default();
        assert_eq!(parameters.answer("MaxBurstLength", "16776192"), value("1048576"));
        assert_eq!(parameters.answer("FirstBurstLength", "0x1000"), value("4096"));
        assert_eq!(parameters.answer("MaxRecvDataSegmentLength", "65536"), Answer::None);
        assert_eq!(parameters.peer_segment_bytes_max, 65536);
        for wrong in ["0", "511", "16777216", "-1", "x", ""] {
            assert_eq!(parameters.answer("MaxRecvDataSegmentLength", wrong), value("Reject"));
        }
    }

    #[test]
    fn there_is_one_connection_and_no_recovery() {
        let mut parameters = Parameters::default();
        assert_eq!(parameters.answer("MaxConnections", "8"), value("1"));
        assert_eq!(parameters.answer("ErrorRecoveryLevel", "2"), value("0"));
        assert_eq!(parameters.answer("X-com.example.key", "1"), Answer::Unknown);
    }

    #[test]
    fn an_initiator_that_offers_ends_with_what_the_target_has() {
        let (mut initiator, mut target) = (Parameters::default(), Parameters::default());
        let mut asked = Vec::new();
        offer(&mut asked, "CRC32C,None");
        for (key, wanted) in text::pairs(&asked).unwrap() {
            match target.answer(key, wanted) {
                Answer::Value(value) => initiator.conclude(key, &value).unwrap(),
                Answer::None => {}
                Answer::Unknown => panic!("{key} is not known"),
            }
        }
        initiator.peer_segment_bytes_max = target.peer_segment_bytes_max;
        assert_eq!(initiator, target);
        assert!(initiator.conclude("InitialR2T", "Maybe").is_err());
    }

    proptest! {
        #[test]
        fn foreign_values_never_panic(key: String, value: String, known in 0usize..6) {
            let keys = ["HeaderDigest", "MaxBurstLength", "InitialR2T", "DefaultTime2Wait", "TaskReporting"];
            let key = keys.get(known).map_or(&*key, |key| key);
            let _ = Parameters::default().answer(key, &value);
            let _ = Parameters::default().conclude(key, &value);
        }
    }
}
