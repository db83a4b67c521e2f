//! Asking a portal which targets it has (RFC 7143 Appendix C).

use super::address::portal_of;
use super::connection::Connector;
use super::limits::{CONNECT_TIME_MAX, DISCOVERY_BYTES_MAX};
use super::login::Agreed;
use super::{ConnectError, Options, Secrets, connector_of};
use crate::limits::SEGMENT_BYTES_MAX;
use crate::name::IscsiName;
use crate::pdu::{FINAL, NO_TAG, TextRequest, TextResponse, text as text_flags};
use crate::text;

/// A target that a portal has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Discovered {
    /// Its name.
    pub target: IscsiName,
    /// Its portals as `HOST:PORT`, as far as they were told; if none were, it is where it was asked for.
    pub portals: Vec<String>,
}

/// The targets that the portal at `host` and `port` shows to this initiator.
pub async fn discover(
    host: &str,
    port: u16,
    secrets: Secrets,
    options: Options,
) -> Result<Vec<Discovered>, ConnectError> {
    let connector = connector_of((host, port), None, 0, secrets, options)?;
    let asked = tokio::time::timeout(CONNECT_TIME_MAX, ask(&connector)).await;
    let text = asked.unwrap_or(Err(ConnectError::TooSlow))?;
    targets_of(&text).ok_or_else(|| ConnectError::Protocol("its list of targets is none".to_owned()))
}

async fn ask(connector: &Connector) -> Result<Vec<u8>, ConnectError> {
    let (mut door, agreed) = connector.log_in().await?;
    let Agreed { cmd_sn, mut exp_stat_sn, parameters, .. } = agreed;
    door.use_digests(parameters.digests);
    let mut question = Vec::new();
    text::push(&mut question, "SendTargets", "All");
    let (mut answer, mut transfer_tag) = (Vec::new(), NO_TAG);
    loop {
        let request =
            TextRequest { flags: FINAL, transfer_tag, cmd_sn, exp_stat_sn, ..TextRequest::default() };
        door.send(request.header().immediate(), &question).await?;
        question.clear();
        let (header, data) = door.receive(SEGMENT_BYTES_MAX as usize).await?;
        if header.opcode() != TextResponse::OPCODE {
            return Err(ConnectError::Protocol("it answers a question with something else".to_owned()));
        }
        let response = TextResponse::parse(&header);
        exp_stat_sn = response.stat_sn.wrapping_add(1);
        answer.extend_from_slice(&data);
        let goes_on = response.flags & (FINAL | text_flags::CONTINUE) != FINAL;
        if !goes_on {
            return Ok(answer);
        }
        // An answer that brings nothing would go on for ever.
        if answer.len() > DISCOVERY_BYTES_MAX || data.is_empty() || response.transfer_tag == NO_TAG {
            return Err(ConnectError::Protocol("its list of targets does not come to an end".to_owned()));
        }
        transfer_tag = response.transfer_tag;
    }
}

/// The targets in an answer to SendTargets.
fn targets_of(answer: &[u8]) -> Option<Vec<Discovered>> {
    let mut targets: Vec<Discovered> = Vec::new();
    for (key, value) in text::pairs(answer).ok()? {
        match key {
            "TargetName" => targets.push(Discovered { target: value.parse().ok()?, portals: Vec::new() }),
            "TargetAddress" => {
                let portal = value.split(',').next().unwrap_or_default();
                let target = targets.last_mut()?;
                // What is not a portal is of no use to anybody, and might not be fit to be shown.
                if portal_of(portal).is_ok() {
                    target.portals.push(portal.to_owned());
                }
            }
            _ => {}
        }
    }
    Some(targets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn portals_belong_to_the_target_before_them() {
        let answer = b"TargetName=iqn.a\0TargetAddress=10.0.0.1:3260,1\0TargetAddress=[::1]:3260,2\0TargetName=iqn.b\0";
        let targets = targets_of(answer).unwrap();
        assert_eq!(targets[0].portals, ["10.0.0.1:3260", "[::1]:3260"]);
        assert_eq!((targets[1].target.as_str(), targets[1].portals.len()), ("iqn.b", 0));
        assert_eq!(targets_of(b"TargetAddress=10.0.0.1,1\0"), None);
        assert_eq!(targets_of(b"TargetName=disk\0"), None);
        assert_eq!(targets_of(b""), Some(Vec::new()));
        let odd = targets_of(b"TargetName=iqn.a\0TargetAddress=\x1b[2J,1\0TargetAddress=host,1\0").unwrap();
        assert_eq!(odd[0].portals, ["host"]);
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(answer: Vec<u8>) {
            let _ = targets_of(&answer);
        }
    }
}
