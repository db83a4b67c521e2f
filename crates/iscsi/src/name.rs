//! iSCSI names (RFC 7143 §4.2.7): `iqn.`, `eui.` and `naa.`, checked once and then trusted.

use std::fmt;
use std::str::FromStr;

use crate::limits::NAME_BYTES_MAX;

/// The world-wide name of an initiator or a target, in lower case: names are compared after that mapping.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IscsiName(String);

/// Why a text is not an iSCSI name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It is empty or longer than [`NAME_BYTES_MAX`].
    #[error("an iSCSI name has 1 to {NAME_BYTES_MAX} bytes")]
    Length,
    /// It does not begin as one.
    #[error("'{0}' is not an iSCSI name: those begin with 'iqn.', 'eui.' or 'naa.'")]
    Kind(String),
    /// It has a character that none may have.
    #[error("'{0}' is not an iSCSI name: only letters, digits, '-', '.' and ':' may stand there")]
    Character(String),
}

impl IscsiName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for IscsiName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for IscsiName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<IscsiName, NameError> {
        if text.is_empty() || text.len() > NAME_BYTES_MAX {
            return Err(NameError::Length);
        }
        let name = text.to_ascii_lowercase();
        if !["iqn.", "eui.", "naa."].iter().any(|kind| name.starts_with(kind)) {
            return Err(NameError::Kind(name));
        }
        // Beyond these the RFC allows prepared Unicode, which no initiator in use has.
        if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.:_".contains(&b)) {
            return Err(NameError::Character(name));
        }
        Ok(IscsiName(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_compared_in_lower_case() {
        let upper: IscsiName = "IQN.2026-01.Example:Disk".parse().unwrap();
        assert_eq!(upper, "iqn.2026-01.example:disk".parse().unwrap());
    }

    #[test]
    fn what_is_no_name_is_refused() {
        assert_eq!("".parse::<IscsiName>(), Err(NameError::Length));
        assert_eq!("x".repeat(224).parse::<IscsiName>(), Err(NameError::Length));
        assert!(matches!("disk".parse::<IscsiName>(), Err(NameError::Kind(_))));
        assert!(matches!("iqn.a/../b".parse::<IscsiName>(), Err(NameError::Character(_))));
        assert!(matches!("iqn.a,t,1".parse::<IscsiName>(), Err(NameError::Character(_))));
    }
}
