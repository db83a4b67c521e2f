//! Names of layers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Names a layer on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct LayerId(pub(super) u64);

impl LayerId {
    /// A name for a new layer.
    pub(crate) fn draw() -> LayerId {
        LayerId(rand::random())
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<LayerId> for String {
    fn from(id: LayerId) -> String {
        id.to_string()
    }
}

impl FromStr for LayerId {
    type Err = String;

    fn from_str(text: &str) -> Result<LayerId, String> {
        let is_plain = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u64::from_str_radix(text, 16).ok().filter(|_| is_plain);
        number.map(LayerId).ok_or_else(|| format!("'{}' names no layer", text.escape_debug()))
    }
}

impl TryFrom<String> for LayerId {
    type Error = String;

    fn try_from(text: String) -> Result<LayerId, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_name_is_sixteen_digits_and_nothing_else() {
        let id = LayerId(0xab);
        assert_eq!(id.to_string(), "00000000000000ab");
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "ab", "../../etc/passwd", "00000000000000ag", "+0000000000000ab"] {
            assert!(bad.parse::<LayerId>().is_err(), "{bad}");
        }
    }
}
