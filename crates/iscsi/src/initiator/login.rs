//! The login phase of an initiator (RFC 7143 §6.3, §11.12): responses in, requests out, and at the end what was
//! agreed or a reason why there is no session. No socket and no clock; randomness comes as a [`Challenge`].
//!
//! What a target can cost is bounded: [`LOGIN_REQUESTS_MAX`] responses and [`TEXT_BYTES_MAX`] of text a step. It
//! is told nothing but its name and ours before it has proved itself, where that is asked of it.

use super::Secrets;
use crate::chap::Algorithm;
use crate::limits::{LOGIN_REQUESTS_MAX, TEXT_BYTES_MAX};
use crate::login::Challenge;
use crate::name::IscsiName;
use crate::params::{self, Answer, Parameters, WrongAnswer};
use crate::pdu::{Isid, LoginRequest, LoginResponse, login_status, stage};
use crate::text;

/// The number of a session's first command.
const FIRST_CMD_SN: u32 = 1;

/// Algorithms that are offered at first, the best one first.
pub(super) const ALGORITHMS: &[Algorithm] = &[Algorithm::Sha256, Algorithm::Md5];

/// The one that every target has.
pub(super) const OLD_ALGORITHMS: &[Algorithm] = &[Algorithm::Md5];

/// Status class of a login that is to be tried elsewhere (RFC 7143 §11.13.5).
const REDIRECTION: u16 = 0x01;

/// Whom to log in to, and as whom.
#[derive(Debug, Clone)]
pub(super) struct Goal {
    pub(super) initiator: IscsiName,
    /// `None` for a discovery session.
    pub(super) target: Option<IscsiName>,
    pub(super) isid: Isid,
    pub(super) secrets: Secrets,
    /// Digests in order of preference.
    pub(super) digests: &'static str,
}

/// What a login came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Agreed {
    pub(super) parameters: Parameters,
    /// The number of the first command.
    pub(super) cmd_sn: u32,
    /// Last command number that is welcome.
    pub(super) max_cmd_sn: u32,
    /// Next status number.
    pub(super) exp_stat_sn: u32,
}

/// Where the login stands after a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Send this request with this text.
    Send(LoginRequest, Vec<u8>),
    /// The full feature phase begins.
    Done(Agreed),
}

/// Why there is no session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum LoginFault {
    /// The target refused with this status.
    #[error("the target refused the login with status {0:#06x}")]
    Refused(u16),
    /// The target is at this portal now.
    #[error("the target has moved")]
    Moved(String),
    /// The target could not prove that it knows its secret.
    #[error("the target did not prove that it knows its secret")]
    Unproven,
    /// The target broke the protocol.
    #[error("{0}")]
    Protocol(&'static str),
    /// The target answered an offer with something that was not offered.
    #[error(transparent)]
    Answer(#[from] WrongAnswer),
}

/// How far the proofs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proof {
    /// The target has to choose a method.
    Method,
    /// It has to choose an algorithm and to send a challenge.
    Algorithm,
    /// It was answered, and may have to answer too.
    Answered(Algorithm),
    /// Nothing is left to prove.
    Done,
}

/// A login under way.
pub(super) struct Login<'a> {
    goal: &'a Goal,
    algorithms: &'static [Algorithm],
    challenge: Challenge,
    stage: u8,
    proof: Proof,
    /// Whether the last request asked for the next stage.
    asked: bool,
    offer: Vec<u8>,
    text: Vec<u8>,
    responses: u32,
    parameters: Parameters,
    exp_stat_sn: u32,
}

impl<'a> Login<'a> {
    /// A login, and its first request. `challenge` is for the target, should it have to prove itself.
    pub(super) fn begin(
        goal: &'a Goal,
        algorithms: &'static [Algorithm],
        challenge: Challenge,
    ) -> (Login<'a>, LoginRequest, Vec<u8>) {
        let mut offer = Vec::new();
        params::offer(&mut offer, goal.digests);
        let mut login = Login {
            goal,
            algorithms,
            challenge,
            stage: stage::SECURITY,
            proof: Proof::Method,
            asked: false,
            offer,
            text: Vec::new(),
            responses: 0,
            parameters: Parameters::default(),
            exp_stat_sn: 0,
        };
        let mut text = Vec::new();
        text::push(&mut text, "InitiatorName", goal.initiator.as_str());
        match &goal.target {
            Some(target) => {
                text::push(&mut text, "TargetName", target.as_str());
                text::push(&mut text, "SessionType", "Normal");
            }
            None => text::push(&mut text, "SessionType", "Discovery"),
        }
        let Secrets { initiator, target } = &goal.secrets;
        let methods = match (initiator, target) {
            (None, _) => "None",
            (Some(_), None) => "CHAP,None",
            (Some(_), Some(_)) => "CHAP",
        };
        text::push(&mut text, "AuthMethod", methods);
        let request = login.request(initiator.is_none());
        (login, request, text)
    }

    /// Deals with a response.
    pub(super) fn feed(&mut self, response: &LoginResponse, data: &[u8]) -> Result<Step, LoginFault> {
        self.check(response, data)?;
        self.text.extend_from_slice(data);
        if response.flags & stage::CONTINUE != 0 {
            return Ok(Step::Send(self.request(false), Vec::new()));
        }
        let text = std::mem::take(&mut self.text);
        let pairs =
            text::pairs(&text).map_err(|_| LoginFault::Protocol("its text is not text of a login"))?;
        let mut out = Vec::new();
        if self.stage == stage::SECURITY {
            self.secure(&pairs, &mut out)?;
        } else {
            self.operate(&pairs, &mut out)?;
        }
        let moves_on = response.flags & stage::TRANSIT != 0;
        if moves_on && self.stage == stage::OPERATIONAL {
            return Ok(Step::Done(self.agreed(response)));
        }
        if moves_on {
            if self.proof != Proof::Done {
                return Err(LoginFault::Protocol("it went on before the proofs were done"));
            }
            self.stage = stage::OPERATIONAL;
            out = self.offer.clone();
        }
        let is_ready = matches!(self.proof, Proof::Answered(_) | Proof::Done);
        Ok(Step::Send(self.request(is_ready), out))
    }

    fn agreed(&self, response: &LoginResponse) -> Agreed {
        let mut parameters = self.parameters.clone();
        parameters.first_burst_bytes_max = parameters.first_burst_bytes_max.min(parameters.burst_bytes_max);
        let (max_cmd_sn, exp_stat_sn) = (response.max_cmd_sn, self.exp_stat_sn);
        Agreed { parameters, cmd_sn: FIRST_CMD_SN, max_cmd_sn, exp_stat_sn }
    }

    fn request(&mut self, asks_to_go_on: bool) -> LoginRequest {
        let next = if self.stage == stage::SECURITY { stage::OPERATIONAL } else { stage::FULL_FEATURE };
        self.asked = asks_to_go_on;
        let transit = if asks_to_go_on { stage::TRANSIT | next } else { 0 };
        LoginRequest {
            flags: transit | self.stage << 2,
            isid: self.goal.isid,
            cmd_sn: FIRST_CMD_SN,
            exp_stat_sn: self.exp_stat_sn,
            ..LoginRequest::default()
        }
    }

    fn check(&mut self, response: &LoginResponse, data: &[u8]) -> Result<(), LoginFault> {
        self.responses += 1;
        if self.responses > LOGIN_REQUESTS_MAX || self.text.len() + data.len() > TEXT_BYTES_MAX {
            return Err(LoginFault::Protocol("its login does not come to an end"));
        }
        if response.task_tag != 0 {
            return Err(LoginFault::Protocol("it answers another login"));
        }
        match response.status {
            login_status::SUCCESS => {}
            status if status >> 8 == REDIRECTION => return Err(moved(data)),
            status => return Err(LoginFault::Refused(status)),
        }
        self.exp_stat_sn = response.stat_sn.wrapping_add(1);
        let (current, next) = (response.flags >> 2 & 3, response.flags & 3);
        let moves_on = response.flags & stage::TRANSIT != 0;
        let goes_on = response.flags & stage::CONTINUE != 0;
        let expected = if self.stage == stage::SECURITY { stage::OPERATIONAL } else { stage::FULL_FEATURE };
        if current != self.stage || (moves_on && (!self.asked || goes_on || next != expected)) {
            return Err(LoginFault::Protocol("its login takes another way than was asked for"));
        }
        Ok(())
    }

    fn secure(&mut self, pairs: &[(&str, &str)], out: &mut Vec<u8>) -> Result<(), LoginFault> {
        let value = |key| pairs.iter().find(|pair| pair.0 == key).map(|pair| pair.1);
        let Secrets { initiator, target } = &self.goal.secrets;
        let unfit = LoginFault::Protocol("what it says of CHAP cannot be understood");
        self.proof = match self.proof {
            Proof::Method => match (value("AuthMethod"), initiator) {
                (Some("CHAP"), Some(_)) => {
                    let numbers = self.algorithms.iter().map(|algorithm| algorithm.number().to_string());
                    text::push(out, "CHAP_A", &numbers.collect::<Vec<_>>().join(","));
                    Proof::Algorithm
                }
                // A target that names no method asks for none.
                (Some("None") | None, _) if target.is_none() => Proof::Done,
                _ => return Err(LoginFault::Protocol("it wants a proof of a kind that was not offered")),
            },
            Proof::Algorithm => {
                let algorithm = value("CHAP_A").and_then(Algorithm::first_known);
                let algorithm = algorithm.filter(|chosen| self.algorithms.contains(chosen));
                let id = value("CHAP_I").and_then(text::number).and_then(|id| u8::try_from(id).ok());
                let theirs = value("CHAP_C").and_then(text::decode_binary);
                let (Some(algorithm), Some(id), Some(theirs), Some(own)) = (algorithm, id, theirs, initiator)
                else {
                    return Err(unfit);
                };
                text::push(out, "CHAP_N", own.user());
                text::push(out, "CHAP_R", &text::encode_binary(&own.respond(algorithm, id, &theirs)));
                if target.is_some() {
                    text::push(out, "CHAP_I", &self.challenge.id.to_string());
                    text::push(out, "CHAP_C", &text::encode_binary(&self.challenge.bytes));
                }
                Proof::Answered(algorithm)
            }
            Proof::Answered(algorithm) => {
                let Challenge { id, bytes } = &self.challenge;
                let response = value("CHAP_R").and_then(text::decode_binary);
                let is_proved = target.as_ref().is_none_or(|target| match (value("CHAP_N"), response) {
                    (Some(user), Some(response)) => target.verify(algorithm, *id, bytes, user, &response),
                    _ => false,
                });
                if !is_proved {
                    return Err(LoginFault::Unproven);
                }
                Proof::Done
            }
            Proof::Done => Proof::Done,
        };
        Ok(())
    }

    fn operate(&mut self, pairs: &[(&str, &str)], out: &mut Vec<u8>) -> Result<(), LoginFault> {
        const DECLARATIONS: [&str; 3] = ["TargetAlias", "TargetAddress", "TargetPortalGroupTag"];
        const NO_ANSWERS: [&str; 3] = ["Reject", "Irrelevant", "NotUnderstood"];
        let offer = text::pairs(&self.offer).expect("what is offered is written here");
        for (key, value) in pairs {
            // What is not agreed on stays as it is without the key.
            if DECLARATIONS.contains(key) || NO_ANSWERS.contains(value) {
                continue;
            }
            if offer.iter().any(|(offered, _)| offered == key) {
                self.parameters.conclude(key, value)?;
                continue;
            }
            match self.parameters.answer(key, value) {
                Answer::Value(value) => text::push(out, key, &value),
                Answer::None => {}
                Answer::Unknown => text::push(out, key, "NotUnderstood"),
            }
        }
        Ok(())
    }
}

/// Where a target that has moved says that it is.
fn moved(data: &[u8]) -> LoginFault {
    let pairs = text::pairs(data).unwrap_or_default();
    let address = pairs.iter().find(|pair| pair.0 == "TargetAddress").map(|pair| pair.1);
    // The portal group behind the comma does not matter to us.
    match address.and_then(|address| address.split(',').next()) {
        Some(portal) => LoginFault::Moved(portal.to_owned()),
        None => LoginFault::Protocol("it has moved, and does not say where to"),
    }
}

#[cfg(test)]
mod tests;
