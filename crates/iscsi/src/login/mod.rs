//! The login phase of a target (RFC 7143 §6.3, §11.12): requests in, responses out, and at the end a session's
//! parameters or a reason why there is none.
//!
//! No sockets, no clock; who may log in is asked of a [`Directory`], and randomness comes as a [`Challenge`].
//! What an initiator can cost is bounded: [`LOGIN_REQUESTS_MAX`] requests and [`TEXT_BYTES_MAX`] of text a
//! step. A refused login is final: the connection ends with the response that says why.

mod security;
#[cfg(test)]
mod tests;

use security::{Security, Verdict};

use crate::chap::{CHALLENGE_BYTES, Credentials};
use crate::limits::{COMMANDS_MAX, LOGIN_REQUESTS_MAX, SEGMENT_BYTES_MAX, TEXT_BYTES_MAX};
use crate::name::IscsiName;
use crate::params::{Answer, Parameters};
use crate::pdu::{Isid, LoginRequest, LoginResponse, login_status, stage};
use crate::text;

/// What an initiator has to prove before it is let in, and what we prove to it.
#[derive(Debug, Clone, Default)]
pub struct Admission {
    /// What it must know; `None` lets everybody in.
    pub initiator: Option<Credentials>,
    /// What we know, for initiators that ask us too.
    pub target: Option<Credentials>,
    /// A name for people; empty if there is none.
    pub alias: String,
}

/// Why an initiator is not even asked for credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// There is no such target.
    Unknown,
    /// It may not use this target.
    Forbidden,
}

/// Who may log in. Both methods answer at once.
pub trait Directory {
    /// For a discovery session.
    fn discovery(&self, initiator: &IscsiName) -> Result<Admission, Refusal>;

    /// For a session with a target.
    fn target(&self, initiator: &IscsiName, target: &IscsiName) -> Result<Admission, Refusal>;
}

/// What was proved at a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Authentication {
    /// Nothing.
    #[default]
    None,
    /// That the initiator knows its secret.
    Initiator,
    /// That both know the secrets of theirs.
    Mutual,
}

/// Random bytes of one login.
#[derive(Debug, Clone, Copy)]
pub struct Challenge {
    /// Identifier of the challenge.
    pub id: u8,
    /// The challenge.
    pub bytes: [u8; CHALLENGE_BYTES],
}

/// What a login came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// Who it is.
    pub initiator: IscsiName,
    /// Which session of it.
    pub isid: Isid,
    /// Which target; `None` for discovery.
    pub target: Option<IscsiName>,
    /// The connection's number.
    pub cid: u16,
    /// What was proved.
    pub authentication: Authentication,
    /// What was negotiated.
    pub parameters: Parameters,
    /// The first command number.
    pub cmd_sn: u32,
    /// The next status number.
    pub stat_sn: u32,
}

/// Where the login stands after a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A further request is expected.
    Continue,
    /// It is done; the response is sent once the session exists.
    Done(Agreed),
    /// It is refused with this [`login_status`].
    Refused(u16),
}

/// A login under way.
pub struct Login {
    challenge: Challenge,
    /// The portal group that the initiator reached.
    group: u16,
    tsih: u16,
    requests: u32,
    stage: u8,
    text: Vec<u8>,
    identity: Option<Identity>,
    security: Security,
    parameters: Parameters,
    told_segment: bool,
    told_group: bool,
    stat_sn: u32,
}

/// What the first request said.
struct Identity {
    initiator: IscsiName,
    target: Option<IscsiName>,
    isid: Isid,
    cid: u16,
    alias: String,
}

impl Login {
    /// A login through a portal of this group; `tsih`, which is not 0, names the session if it comes to one.
    pub fn new(challenge: Challenge, group: u16, tsih: u16) -> Login {
        Login {
            challenge,
            group,
            tsih,
            requests: 0,
            stage: stage::SECURITY,
            text: Vec::new(),
            identity: None,
            security: Security::default(),
            parameters: Parameters::default(),
            told_segment: false,
            told_group: false,
            stat_sn: 0,
        }
    }

    /// Deals with a request: the response, its text, and where the login stands.
    pub fn feed(
        &mut self,
        request: &LoginRequest,
        data: &[u8],
        directory: &dyn Directory,
    ) -> (LoginResponse, Vec<u8>, Step) {
        let mut out = Vec::new();
        let step = self.advance(request, data, directory, &mut out);
        let mut response = LoginResponse {
            isid: request.isid,
            task_tag: request.task_tag,
            stat_sn: self.stat_sn,
            exp_cmd_sn: request.cmd_sn,
            max_cmd_sn: request.cmd_sn.wrapping_add(COMMANDS_MAX - 1),
            ..LoginResponse::default()
        };
        self.stat_sn = self.stat_sn.wrapping_add(1);
        match step {
            Err(status) => {
                response.status = status;
                (response, Vec::new(), Step::Refused(status))
            }
            Ok(None) => {
                response.flags = current_of(request.flags) << 2;
                (response, out, Step::Continue)
            }
            Ok(Some(next)) => {
                response.flags = stage::TRANSIT | current_of(request.flags) << 2 | next;
                self.stage = next;
                if next != stage::FULL_FEATURE {
                    return (response, out, Step::Continue);
                }
                response.tsih = self.tsih;
                match self.agreed(request) {
                    Some(agreed) => (response, out, Step::Done(agreed)),
                    None => (response, Vec::new(), Step::Refused(login_status::INITIATOR_ERROR)),
                }
            }
        }
    }

    /// What the initiator calls itself, as far as it has said so.
    pub fn initiator(&self) -> String {
        self.identity.as_ref().map_or("an unnamed initiator".to_owned(), |i| i.initiator.to_string())
    }

    fn agreed(&self, request: &LoginRequest) -> Option<Agreed> {
        let identity = self.identity.as_ref()?;
        Some(Agreed {
            initiator: identity.initiator.clone(),
            isid: identity.isid,
            target: identity.target.clone(),
            cid: identity.cid,
            authentication: self.security.proved(),
            parameters: self.parameters.clone(),
            cmd_sn: request.cmd_sn,
            stat_sn: self.stat_sn,
        })
    }

    /// The stage that this request leads to, if it leads to another.
    fn advance(
        &mut self,
        request: &LoginRequest,
        data: &[u8],
        directory: &dyn Directory,
        out: &mut Vec<u8>,
    ) -> Result<Option<u8>, u16> {
        self.check(request, data)?;
        self.text.extend_from_slice(data);
        if request.flags & stage::CONTINUE != 0 {
            return Ok(None);
        }
        let text = std::mem::take(&mut self.text);
        let pairs = text::pairs(&text).map_err(|_| login_status::INITIATOR_ERROR)?;
        if self.identity.is_none() {
            self.identify(request, &pairs, directory)?;
        }
        let current = current_of(request.flags);
        if current == stage::OPERATIONAL {
            if !self.security.is_done() {
                return Err(login_status::AUTHENTICATION);
            }
            self.operate(&pairs, out);
        } else {
            self.secure(&pairs, out)?;
        }
        self.tell_group(out);
        let wants = request.flags & stage::TRANSIT != 0;
        let may = current == stage::OPERATIONAL || self.security.is_done();
        Ok((wants && may).then_some(request.flags & 3))
    }

    fn check(&mut self, request: &LoginRequest, data: &[u8]) -> Result<(), u16> {
        self.requests += 1;
        if self.requests > LOGIN_REQUESTS_MAX || self.text.len() + data.len() > TEXT_BYTES_MAX {
            return Err(login_status::OUT_OF_RESOURCES);
        }
        if request.version_min > 0 {
            return Err(login_status::VERSION);
        }
        // A session has one connection, so there is none to join.
        if request.tsih != 0 {
            return Err(login_status::NO_SESSION);
        }
        let (current, next) = (current_of(request.flags), request.flags & 3);
        let transit = request.flags & stage::TRANSIT != 0;
        let goes_on = request.flags & stage::CONTINUE != 0;
        let first = self.requests == 1;
        // Only the first request chooses where to begin.
        let in_order = if first { current <= stage::OPERATIONAL } else { current == self.stage };
        let forward = !transit || (next > current && next != 2);
        if !in_order || !forward || (transit && goes_on) {
            return Err(login_status::INVALID_REQUEST);
        }
        self.stage = current;
        let same = self.identity.as_ref().is_none_or(|i| i.isid == request.isid && i.cid == request.cid);
        if same { Ok(()) } else { Err(login_status::INVALID_REQUEST) }
    }

    fn identify(
        &mut self,
        request: &LoginRequest,
        pairs: &[(&str, &str)],
        directory: &dyn Directory,
    ) -> Result<(), u16> {
        let value = |key| pairs.iter().find(|pair| pair.0 == key).map(|pair| pair.1);
        let name = |key| {
            let text = value(key).ok_or(login_status::MISSING_PARAMETER)?;
            text.parse::<IscsiName>().map_err(|_| login_status::INITIATOR_ERROR)
        };
        let initiator = name("InitiatorName")?;
        let target = match value("SessionType") {
            Some("Discovery") => None,
            None | Some("Normal") => Some(name("TargetName")?),
            Some(_) => return Err(login_status::SESSION_TYPE),
        };
        let admission = match &target {
            None => directory.discovery(&initiator),
            Some(target) => directory.target(&initiator, target),
        };
        let admission = admission.map_err(|refusal| match refusal {
            Refusal::Unknown => login_status::NOT_FOUND,
            Refusal::Forbidden => login_status::FORBIDDEN,
        })?;
        self.security = Security::new(admission.initiator, admission.target, self.challenge);
        let (isid, cid) = (request.isid, request.cid);
        self.identity = Some(Identity { initiator, target, isid, cid, alias: admission.alias });
        Ok(())
    }

    fn secure(&mut self, pairs: &[(&str, &str)], out: &mut Vec<u8>) -> Result<(), u16> {
        let others = match self.security.step(pairs, out) {
            Verdict::Go(others) => others,
            Verdict::Refuse => return Err(login_status::AUTHENTICATION),
        };
        // Initiators may bring operational keys early; what was agreed counts once they are in.
        self.answer(&others, out);
        Ok(())
    }

    fn operate(&mut self, pairs: &[(&str, &str)], out: &mut Vec<u8>) {
        self.answer(pairs, out);
        if !self.told_segment {
            self.told_segment = true;
            text::push(out, "MaxRecvDataSegmentLength", &SEGMENT_BYTES_MAX.to_string());
        }
    }

    fn answer(&mut self, pairs: &[(&str, &str)], out: &mut Vec<u8>) {
        const DECLARATIONS: [&str; 4] = ["InitiatorName", "InitiatorAlias", "TargetName", "SessionType"];
        for (key, value) in pairs {
            if DECLARATIONS.contains(key) {
                continue;
            }
            match self.parameters.answer(key, value) {
                Answer::Value(value) => text::push(out, key, &value),
                Answer::None => {}
                // An unknown key must not make the answer longer than the question was.
                Answer::Unknown => text::push(out, key, "NotUnderstood"),
            }
        }
        let burst = self.parameters.burst_bytes_max;
        self.parameters.first_burst_bytes_max = self.parameters.first_burst_bytes_max.min(burst);
    }

    fn tell_group(&mut self, out: &mut Vec<u8>) {
        let Some(identity) = self.identity.as_ref().filter(|i| i.target.is_some() && !self.told_group) else {
            return;
        };
        text::push(out, "TargetPortalGroupTag", &self.group.to_string());
        if !identity.alias.is_empty() {
            text::push(out, "TargetAlias", &identity.alias);
        }
        self.told_group = true;
    }
}

fn current_of(flags: u8) -> u8 {
    flags >> 2 & 3
}
