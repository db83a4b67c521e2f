//! CHAP (RFC 7143 §12.1.3, RFC 1994): challenges, and the responses that only who knows the secret can give.
//!
//! Randomness comes in as an argument. Responses are compared in a time that does not depend on where they
//! differ.

use std::fmt;

use md5::{Digest, Md5};
use sha2::Sha256;

use crate::limits::{SECRET_BYTES_MAX, SECRET_BYTES_MIN};

/// Length of our challenges in bytes: as long as the longest response.
pub const CHALLENGE_BYTES: usize = 32;

/// How a response is computed; the numbers are those of IANA's registry of PPP authentication algorithms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// MD5, number 5, which every initiator has.
    Md5,
    /// SHA-256, number 7.
    Sha256,
}

impl Algorithm {
    /// Its number on the wire.
    pub fn number(self) -> u32 {
        match self {
            Algorithm::Md5 => 5,
            Algorithm::Sha256 => 7,
        }
    }

    /// The first algorithm of a list, as in `CHAP_A`, that is known here.
    pub fn first_known(list: &str) -> Option<Algorithm> {
        list.split(',').find_map(|number| match number {
            "5" => Some(Algorithm::Md5),
            "7" => Some(Algorithm::Sha256),
            _ => None,
        })
    }

    /// The response to a challenge.
    pub fn response(self, id: u8, secret: &[u8], challenge: &[u8]) -> Vec<u8> {
        match self {
            Algorithm::Md5 => digest(Md5::new(), id, secret, challenge),
            Algorithm::Sha256 => digest(Sha256::new(), id, secret, challenge),
        }
    }
}

fn digest<D: Digest>(digest: D, id: u8, secret: &[u8], challenge: &[u8]) -> Vec<u8> {
    digest.chain_update([id]).chain_update(secret).chain_update(challenge).finalize().to_vec()
}

/// A name and the secret that goes with it.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    user: String,
    secret: Vec<u8>,
}

/// The secret is shorter or longer than secrets may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a CHAP secret has {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes, this one has {0}")]
pub struct SecretLength(usize);

impl Credentials {
    /// Credentials, if the secret has a length that is safe and that initiators take.
    pub fn new(user: &str, secret: &[u8]) -> Result<Credentials, SecretLength> {
        if !(SECRET_BYTES_MIN..=SECRET_BYTES_MAX).contains(&secret.len()) {
            return Err(SecretLength(secret.len()));
        }
        Ok(Credentials { user: user.to_owned(), secret: secret.to_owned() })
    }

    /// The name.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// Our response to the other side's challenge.
    pub fn respond(&self, algorithm: Algorithm, id: u8, challenge: &[u8]) -> Vec<u8> {
        algorithm.response(id, &self.secret, challenge)
    }

    /// Whether another side that says this name and gives this response to our challenge knows the secret.
    pub fn verify(
        &self,
        algorithm: Algorithm,
        id: u8,
        challenge: &[u8],
        user: &str,
        response: &[u8],
    ) -> bool {
        let expected = self.respond(algorithm, id, challenge);
        let differing = expected.iter().zip(response).fold(0, |all, (a, b)| all | (a ^ b));
        user == self.user && response.len() == expected.len() && differing == 0
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses_are_the_hash_of_id_secret_and_challenge() {
        let md5 = Algorithm::Md5.response(1, b"abc", b"def");
        assert_eq!(md5, Md5::digest(b"\x01abcdef").to_vec());
        assert_eq!(Algorithm::Sha256.response(1, b"abc", b"def").len(), 32);
    }

    #[test]
    fn only_who_knows_name_and_secret_is_believed() {
        let credentials = Credentials::new("node", b"correct horse").unwrap();
        let other = Credentials::new("node", b"battery staple").unwrap();
        for algorithm in [Algorithm::Md5, Algorithm::Sha256] {
            let response = credentials.respond(algorithm, 7, b"challenge");
            let believed = |id, challenge: &[u8], user: &str, response: &[u8]| {
                credentials.verify(algorithm, id, challenge, user, response)
            };
            assert!(believed(7, b"challenge", "node", &response));
            assert!(!believed(8, b"challenge", "node", &response));
            assert!(!believed(7, b"another", "node", &response));
            assert!(!believed(7, b"challenge", "edon", &response));
            assert!(!believed(7, b"challenge", "node", &response[..15]));
            assert!(!believed(7, b"challenge", "node", &other.respond(algorithm, 7, b"challenge")));
        }
    }

    #[test]
    fn secrets_are_long_enough_and_never_shown() {
        assert_eq!(Credentials::new("a", b"elevenbytes"), Err(SecretLength(11)));
        assert!(Credentials::new("a", &[1; 256]).is_err());
        let shown = format!("{:?}", Credentials::new("a", b"correct horse").unwrap());
        assert!(!shown.contains("correct") && !shown.contains("99"), "{shown}");
    }

    #[test]
    fn the_first_known_algorithm_is_chosen() {
        assert_eq!(Algorithm::first_known("8,7,5"), Some(Algorithm::Sha256));
        assert_eq!(Algorithm::first_known("5,7"), Some(Algorithm::Md5));
        assert_eq!(Algorithm::first_known("6,8"), None);
    }
}
