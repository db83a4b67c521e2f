//! The security stage: no authentication, or CHAP in one or both directions (RFC 7143 §12.1).

use super::{Authentication, Challenge};
use crate::chap::{Algorithm, Credentials};
use crate::text;

/// Authentication of one login.
#[derive(Default)]
pub(super) struct Security {
    /// What the initiator must know.
    initiator: Option<Credentials>,
    /// What we know.
    target: Option<Credentials>,
    challenge: Option<Challenge>,
    state: State,
    proved: Authentication,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// A method has to be chosen.
    #[default]
    Method,
    /// CHAP was chosen, its algorithm not yet.
    Algorithm,
    /// The challenge was sent.
    Challenged(Algorithm),
    /// The initiator may go on.
    Done,
}

/// What a step of this stage came to.
pub(super) enum Verdict<'a> {
    /// The stage goes on, or is over; these pairs are not about security.
    Go(Vec<(&'a str, &'a str)>),
    /// The initiator is not who it says, or cannot say.
    Refuse,
}

impl Security {
    pub(super) fn new(
        initiator: Option<Credentials>,
        target: Option<Credentials>,
        challenge: Challenge,
    ) -> Security {
        Security { initiator, target, challenge: Some(challenge), ..Security::default() }
    }

    /// Whether nothing is left to prove.
    pub(super) fn is_done(&self) -> bool {
        self.initiator.is_none() || self.state == State::Done
    }

    /// What was proved so far.
    pub(super) fn proved(&self) -> Authentication {
        self.proved
    }

    /// Deals with the pairs of one request.
    pub(super) fn step<'a>(&mut self, pairs: &[(&'a str, &'a str)], out: &mut Vec<u8>) -> Verdict<'a> {
        let is_ours = |key: &str| key == "AuthMethod" || key.starts_with("CHAP_");
        let (ours, others): (Vec<_>, Vec<_>) = pairs.iter().copied().partition(|pair| is_ours(pair.0));
        let value = |key: &str| ours.iter().find(|pair| pair.0 == key).map(|pair| pair.1);
        let done = match self.state {
            State::Method => match value("AuthMethod") {
                Some(methods) => self.choose(methods, out),
                // An initiator that names no method offers none.
                None => Some(()),
            },
            State::Algorithm => value("CHAP_A").and_then(|list| self.challenge(list, out)),
            State::Challenged(algorithm) => self.verify(algorithm, &ours, out),
            State::Done => ours.is_empty().then_some(()),
        };
        done.map_or(Verdict::Refuse, |()| Verdict::Go(others))
    }

    fn choose(&mut self, methods: &str, out: &mut Vec<u8>) -> Option<()> {
        let has = |method| methods.split(',').any(|m| m == method);
        if self.initiator.is_some() {
            if !has("CHAP") {
                return None;
            }
            text::push(out, "AuthMethod", "CHAP");
            self.state = State::Algorithm;
        } else {
            if !has("None") {
                return None;
            }
            text::push(out, "AuthMethod", "None");
            self.state = State::Done;
        }
        Some(())
    }

    fn challenge(&mut self, list: &str, out: &mut Vec<u8>) -> Option<()> {
        let algorithm = Algorithm::first_known(list)?;
        let challenge = self.challenge?;
        text::push(out, "CHAP_A", &algorithm.number().to_string());
        text::push(out, "CHAP_I", &challenge.id.to_string());
        text::push(out, "CHAP_C", &text::encode_binary(&challenge.bytes));
        self.state = State::Challenged(algorithm);
        Some(())
    }

    fn verify(&mut self, algorithm: Algorithm, pairs: &[(&str, &str)], out: &mut Vec<u8>) -> Option<()> {
        let value = |key: &str| pairs.iter().find(|pair| pair.0 == key).map(|pair| pair.1);
        let ours = self.challenge?;
        let (user, response) = (value("CHAP_N")?, text::decode_binary(value("CHAP_R")?)?);
        if !self.initiator.as_ref()?.verify(algorithm, ours.id, &ours.bytes, user, &response) {
            return None;
        }
        self.proved = Authentication::Initiator;
        if let (Some(id), Some(challenge)) = (value("CHAP_I"), value("CHAP_C")) {
            let id = text::number(id).and_then(|id| u8::try_from(id).ok())?;
            let challenge = text::decode_binary(challenge)?;
            // Our own challenge sent back would have us compute what the initiator should (§9.2.1).
            if challenge == ours.bytes {
                return None;
            }
            let target = self.target.as_ref()?;
            text::push(out, "CHAP_N", target.user());
            text::push(out, "CHAP_R", &text::encode_binary(&target.respond(algorithm, id, &challenge)));
            self.proved = Authentication::Mutual;
        }
        self.state = State::Done;
        Some(())
    }
}
