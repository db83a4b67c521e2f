//! Addresses of logical units: `iscsi://[USER@]HOST[:PORT]/TARGET/LUN`, as libiscsi writes them, but never with a
//! secret: an address stands in process lists, histories and logs.

use std::fmt;
use std::str::FromStr;

use super::limits::ADDRESS_BYTES_MAX;
use crate::name::IscsiName;

/// The port that IANA gave to iSCSI.
pub const PORT_DEFAULT: u16 = 3260;

/// Largest number of a logical unit: what flat space addressing holds (SAM-5 §4.7.4).
const LUN_MAX: u16 = 0x3fff;

/// Where a logical unit is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address {
    /// The name that goes with the secret; who logs in without one proves nothing.
    pub user: Option<String>,
    /// Name or number of the portal's host; an IPv6 address stands without brackets.
    pub host: String,
    /// Port of the portal.
    pub port: u16,
    /// The target.
    pub target: IscsiName,
    /// The logical unit.
    pub lun: u16,
}

/// A text is not an address of a logical unit. The text is not shown: there may be a secret in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is not an iSCSI address: {0}; use iscsi://[USER@]HOST[:PORT]/TARGET/LUN")]
pub struct AddressError(String);

impl Address {
    /// The eight bytes that name the logical unit on the wire (SAM-5 §4.7).
    pub(super) fn lun_on_wire(&self) -> u64 {
        const FLAT: u64 = 0x4000;
        let lun = u64::from(self.lun);
        (if lun < 256 { lun } else { FLAT | lun }) << 48
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("iscsi://")?;
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        write!(f, "{}/{}/{}", Portal(&self.host, self.port), self.target, self.lun)
    }
}

/// A host and its port, as they stand in addresses.
struct Portal<'a>(&'a str, u16);

impl fmt::Display for Portal<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (open, close) = if self.0.contains(':') { ("[", "]") } else { ("", "") };
        write!(f, "{open}{}{close}", self.0)?;
        if self.1 == PORT_DEFAULT { Ok(()) } else { write!(f, ":{}", self.1) }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Address, AddressError> {
        parse(text).map_err(AddressError)
    }
}

fn parse(text: &str) -> Result<Address, String> {
    if text.len() > ADDRESS_BYTES_MAX {
        return Err(format!("it has more than {ADDRESS_BYTES_MAX} bytes"));
    }
    let rest = text.strip_prefix("iscsi://").ok_or("it does not begin with iscsi://")?;
    // A secret may hold any character, so that the name ends at the last '@'.
    let (user, rest) = match rest.rsplit_once('@') {
        Some((user, rest)) => (Some(user_of(user)?), rest),
        None => (None, rest),
    };
    if rest.contains('?') {
        return Err("it has parameters behind a '?', and there are none".to_owned());
    }
    let mut parts = rest.split('/');
    let (Some(portal), Some(target), Some(lun), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err("it does not have a host, a target and the number of a logical unit".to_owned());
    };
    let (host, port) = portal_of(portal)?;
    let target = target.parse().map_err(|e: crate::name::NameError| e.to_string())?;
    let lun = lun.parse().ok().filter(|lun| *lun <= LUN_MAX);
    let lun = lun.ok_or(format!("the number of its logical unit is none of 0 to {LUN_MAX}"))?;
    Ok(Address { user, host, port, target, lun })
}

fn user_of(text: &str) -> Result<String, String> {
    // Names of initiators are common as names of users, and have a ':' of their own.
    let has_secret = text.contains('%') || (text.contains(':') && text.parse::<IscsiName>().is_err());
    if has_secret {
        return Err("there is a secret in it, where everybody can read it: leave only the name of the user \
                    before the '@', and give the secret in a file or in the environment"
            .to_owned());
    }
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b'@') {
        return Err("the name of its user is empty, or has characters that none may have".to_owned());
    }
    Ok(text.to_owned())
}

/// A portal as `HOST[:PORT]`, with brackets around an IPv6 address.
pub(super) fn portal_of(text: &str) -> Result<(String, u16), String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(bracketed) => {
            let (host, port) = bracketed.split_once(']').ok_or("its '[' is not closed")?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| "there is no IPv6 address in its brackets")?;
            (host, port)
        }
        None => {
            let (host, port) = text.split_at(text.find(':').unwrap_or(text.len()));
            if host.is_empty() || !host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) {
                return Err("it has no host, or one with characters that none may have".to_owned());
            }
            (host, port)
        }
    };
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => PORT_DEFAULT,
        Some(port) => port.parse().ok().filter(|p| *p != 0).ok_or("its port is none of 1 to 65535")?,
        None => return Err("something stands behind the brackets that is not a port".to_owned()),
    };
    Ok((host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn why(text: &str) -> String {
        text.parse::<Address>().expect_err(text).to_string()
    }

    #[test]
    fn addresses_survive_their_text_form() {
        for text in [
            "iscsi://storage.example/iqn.2026-01.test:disk/0",
            "iscsi://node-1@10.0.0.1:3261/iqn.2026-01.test:disk/16383",
            "iscsi://iqn.2026-01.test:me@[fe80::1]/eui.02004567a425678d/1",
            "iscsi://[::1]:1/naa.52004567ba64678d/255",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        let address: Address = "iscsi://host:3260/IQN.x/300".parse().unwrap();
        assert_eq!(address.to_string(), "iscsi://host/iqn.x/300");
        assert_eq!(address.lun_on_wire(), 0x412c << 48);
    }

    #[test]
    fn a_secret_is_refused_with_the_remedy_and_never_shown() {
        for text in ["me%hidden secret@host", "me:hidden@host", "me%hid@den@host", "%hidden@host"] {
            let why = why(&format!("iscsi://{text}/iqn.x/0"));
            assert!(why.contains("environment") && !why.contains("hid"), "{why}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, expected) in [
            ("nbd://host/x", "iscsi://"),
            ("iscsi://host/iqn.x", "logical unit"),
            ("iscsi://host/iqn.x/0/0", "logical unit"),
            ("iscsi://host/disk/0", "'disk'"),
            ("iscsi://host/iqn.x/16384", "16383"),
            ("iscsi://host/iqn.x/-1", "16383"),
            ("iscsi://host:0/iqn.x/0", "port"),
            ("iscsi://:3260/iqn.x/0", "host"),
            ("iscsi://[::1/iqn.x/0", "'['"),
            ("iscsi://[::1]3260/iqn.x/0", "brackets"),
            ("iscsi://@host/iqn.x/0", "user"),
            ("iscsi://host/iqn.x/0?header_digest=crc32c", "'?'"),
        ] {
            assert!(why(text).contains(expected), "{text}: {}", why(text));
        }
    }

    proptest! {
        #[test]
        fn foreign_text_never_panics(text: String) {
            let _ = text.parse::<Address>();
            let _ = format!("iscsi://{text}").parse::<Address>();
            let _ = portal_of(&text);
        }
    }
}
