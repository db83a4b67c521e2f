//! One-time tokens with which a node joins: what the operator carries from Volt to the new node.
//!
//! A token is a line such as `vmt1_…`: base64url of the CA's fingerprint (32 bytes), the secret (32
//! bytes), Volt's address (UTF-8) and a checksum (4 bytes of BLAKE3), so that a line that was cut while
//! copying is recognised before anything is dialled. The fingerprint lets the node know Volt before it
//! shows the secret; the secret lets Volt know the node.
//!
//! Volt keeps a [`Grant`], which holds only the hash of the secret: who reads Volt's storage cannot join
//! with what is found there.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use block::NodeName;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How long a token lives unless told otherwise: time enough to install a rack, and not until tomorrow.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(3600);

/// What a token begins with; the digit is the version of the form.
const PREFIX: &str = "vmt1_";

/// Longest address of Volt in bytes: a DNS name (253) with a port.
pub(crate) const ADDRESS_BYTES_MAX: usize = 260;

const HASH_BYTES: usize = 32;
const CHECKSUM_BYTES: usize = 4;

/// A text is not a token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is of another kind or damaged.
    #[error("this is not a join token ({0}): copy the whole line that 'virtman volt token' printed")]
    Malformed(&'static str),
    /// The address in it cannot be dialled.
    #[error("'{0}' is not an address: expected HOST:PORT, such as volt.example:7070 or [fd00::1]:7070")]
    Address(String),
}

/// A value of 32 bytes that is written in base64url.
macro_rules! bytes32 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub struct $name([u8; HASH_BYTES]);

        /// Takes the same time wherever the values differ.
        impl PartialEq for $name {
            fn eq(&self, other: &Self) -> bool {
                blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(other.0)
            }
        }

        impl Eq for $name {}

        impl FromStr for $name {
            type Err = TokenError;
            fn from_str(text: &str) -> Result<Self, TokenError> {
                let bytes = URL_SAFE_NO_PAD.decode(text).ok().and_then(|b| b.try_into().ok());
                bytes.map(Self).ok_or(TokenError::Malformed("expected 32 bytes in base64url"))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&URL_SAFE_NO_PAD.encode(self.0))
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

bytes32!(
    /// The BLAKE3 hash of the DER form of the cluster's CA certificate.
    Fingerprint
);
bytes32!(
    /// What a token proves its holder's right with. Never printed, never stored by Volt.
    Secret
);
bytes32!(
    /// What Volt stores of a secret.
    SecretHash
);

impl SecretHash {
    /// The bytes themselves, as a key of tables.
    pub fn as_bytes(&self) -> &[u8; HASH_BYTES] {
        &self.0
    }
}

impl Fingerprint {
    /// The fingerprint of a certificate in DER.
    pub fn of(der: &[u8]) -> Self {
        Self(*blake3::hash(der).as_bytes())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

impl fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretHash({})", URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl Secret {
    /// The hash that Volt stores. The secret has 256 random bits, so no slow hash is needed.
    pub fn hash(&self) -> SecretHash {
        SecretHash(blake3::derive_key("VirtMan 2026-11 secret of a join token", &self.0))
    }
}

/// A one-time right to join, as the operator carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    address: String,
    ca: Fingerprint,
    secret: Secret,
}

impl Token {
    /// A new token for the Volt at `address` (`HOST:PORT`, as nodes reach it).
    ///
    /// # Errors
    /// The address has another form.
    pub fn new(address: &str, ca: Fingerprint) -> Result<Self, TokenError> {
        check_address(address)?;
        Ok(Self { address: address.to_owned(), ca, secret: Secret(rand::random()) })
    }

    /// Where Volt listens, as `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The CA whose certificate Volt must show.
    pub fn ca(&self) -> Fingerprint {
        self.ca
    }

    /// What proves the right to join.
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// What Volt keeps of this token: valid until `expires`, and only for `node` if one is given.
    pub fn grant(&self, expires: SystemTime, node: Option<NodeName>) -> Grant {
        let expires = expires.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Grant { secret_hash: self.secret.hash(), expires_unix_seconds: expires, node }
    }
}

/// `HOST:PORT` with characters that occur in addresses: the text reaches resolvers and messages.
fn check_address(address: &str) -> Result<(), TokenError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'[' | b']');
    let parts = address.rsplit_once(':');
    let whole = parts.is_some_and(|(host, port)| {
        let host_is_whole = !host.is_empty() && (!host.contains(':') || host.starts_with('['));
        host_is_whole && port.parse::<u16>().is_ok_and(|p| p != 0)
    });
    if whole && address.len() <= ADDRESS_BYTES_MAX && address.bytes().all(allowed) {
        Ok(())
    } else {
        Err(TokenError::Address(address.chars().take(80).flat_map(char::escape_debug).collect()))
    }
}

/// The text form: it holds the secret, so show it once and to the operator alone.
impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = [self.ca.0.as_slice(), &self.secret.0, self.address.as_bytes()].concat();
        let checksum = blake3::hash(&bytes);
        bytes.extend_from_slice(&checksum.as_bytes()[..CHECKSUM_BYTES]);
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl FromStr for Token {
    type Err = TokenError;
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let body =
            text.trim().strip_prefix(PREFIX).ok_or(TokenError::Malformed("it must begin with vmt1_"))?;
        if body.len() > 2 * (2 * HASH_BYTES + ADDRESS_BYTES_MAX + CHECKSUM_BYTES) {
            return Err(TokenError::Malformed("it is too long"));
        }
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::Malformed("it is not base64url"))?;
        let cut = TokenError::Malformed("it is cut or mistyped");
        let (content, checksum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or(cut.clone())?;
        if blake3::hash(content).as_bytes()[..CHECKSUM_BYTES] != *checksum {
            return Err(cut);
        }
        let (ca, rest) = content.split_first_chunk().ok_or(cut.clone())?;
        let (secret, address) = rest.split_first_chunk().ok_or(cut.clone())?;
        let address = std::str::from_utf8(address).map_err(|_| cut)?;
        check_address(address)?;
        Ok(Self { address: address.to_owned(), ca: Fingerprint(*ca), secret: Secret(*secret) })
    }
}

/// Why a join is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinRefusal {
    /// Never given out, or used.
    #[error("the token is unknown or was used before: ask for a new one with 'virtman volt token'")]
    UnknownToken,
    /// Its time is over.
    #[error("the token has expired: ask for a new one with 'virtman volt token'")]
    Expired,
    /// It is for another node.
    #[error("the token is for node '{granted}', not for '{asked}'")]
    WrongName {
        /// Whom the token is for.
        granted: NodeName,
        /// Who asked.
        asked: NodeName,
    },
    /// The cluster has such a node, and the token does not say that it may be replaced.
    #[error(
        "there is a node '{0}' already: choose another name, or ask for a token for that name to replace it"
    )]
    NameTaken(NodeName),
    /// The store of tokens failed.
    #[error("Volt cannot look up tokens now: {0}")]
    Unavailable(String),
}

/// What Volt keeps of a token that it gave out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The hash of its secret, by which it is found.
    pub secret_hash: SecretHash,
    /// When it ends, in seconds since 1970.
    pub expires_unix_seconds: u64,
    /// The only node that may use it; who has such a token may also replace that node.
    pub node: Option<NodeName>,
}

impl Grant {
    /// Whether the holder of the secret may join as `node` at `now`.
    ///
    /// # Errors
    /// The token has expired, or is for another node. It is not used up by that.
    pub fn admits(&self, node: &NodeName, now: SystemTime) -> Result<(), JoinRefusal> {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if now >= self.expires_unix_seconds {
            return Err(JoinRefusal::Expired);
        }
        match &self.node {
            Some(granted) if granted != node => {
                Err(JoinRefusal::WrongName { granted: granted.clone(), asked: node.clone() })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token::new("volt.example:7070", Fingerprint::of(b"a certificate")).unwrap()
    }

    #[test]
    fn a_token_survives_its_text_form() {
        for address in ["volt.example:7070", "127.0.0.1:1", "[fd00::1]:65535"] {
            let token = Token::new(address, Fingerprint::of(b"ca")).unwrap();
            assert_eq!(token.to_string().parse(), Ok(token));
        }
    }

    #[test]
    fn a_token_with_any_byte_cut_off_or_changed_is_refused() {
        let text = token().to_string();
        for end in 0..text.len() {
            assert!(text[..end].parse::<Token>().is_err(), "the first {end} characters");
        }
        for at in PREFIX.len()..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(changed.parse::<Token>().is_err(), "character {at} changed");
        }
    }

    #[test]
    fn an_address_that_cannot_be_dialled_gets_no_token() {
        for address in
            ["", "volt", "volt:", ":7070", "volt:0", "volt:99999", "fd00::1:7070", "a b:1", "a\n:1", "a/b:1"]
        {
            let error = Token::new(address, Fingerprint::of(b"ca")).unwrap_err();
            assert!(matches!(error, TokenError::Address(_)), "{address:?}");
        }
    }

    #[test]
    fn neither_debug_nor_the_grant_shows_the_secret() {
        let token = token();
        let secret = URL_SAFE_NO_PAD.encode(token.secret().0);
        assert!(!format!("{token:?}").contains(&secret));
        let grant = serde_json::to_string(&token.grant(SystemTime::now(), None)).unwrap();
        assert!(!grant.contains(&secret), "{grant}");
        assert!(!grant.contains(&URL_SAFE_NO_PAD.encode(blake3::hash(&token.secret().0).as_bytes())));
    }

    #[test]
    fn a_grant_admits_its_node_until_it_expires() {
        let (a, b): (NodeName, NodeName) = ("a".parse().unwrap(), "b".parse().unwrap());
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let grant = token().grant(now + Duration::from_secs(1), Some(a.clone()));
        assert_eq!(grant.admits(&a, now), Ok(()));
        assert_eq!(
            grant.admits(&b, now),
            Err(JoinRefusal::WrongName { granted: a.clone(), asked: b.clone() })
        );
        assert_eq!(grant.admits(&a, now + Duration::from_secs(1)), Err(JoinRefusal::Expired));
        assert_eq!(token().grant(now + TOKEN_LIFETIME, None).admits(&b, now), Ok(()));
    }
}
