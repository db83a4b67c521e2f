//! Text of logins and text requests (RFC 7143 §6): `key=value`, each closed by a zero byte.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::limits::{BINARY_BYTES_MAX, KEY_BYTES_MAX};

/// The bytes are no text of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// It is not UTF-8.
    #[error("the text of a negotiation is not UTF-8")]
    NotUtf8,
    /// A pair has no `=`, or a key of no or too many bytes.
    #[error("the text of a negotiation has something that is not key=value")]
    NotAPair,
}

/// The keys and values of a whole text, in order. A missing zero byte at the end is forgiven.
pub fn pairs(text: &[u8]) -> Result<Vec<(&str, &str)>, TextError> {
    let text = std::str::from_utf8(text).map_err(|_| TextError::NotUtf8)?;
    let pairs = text.split('\0').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| match pair.split_once('=') {
            Some((key, value)) if (1..=KEY_BYTES_MAX).contains(&key.len()) => Ok((key, value)),
            _ => Err(TextError::NotAPair),
        })
        .collect()
}

/// Appends a pair to a text.
pub fn push(text: &mut Vec<u8>, key: &str, value: &str) {
    text.extend_from_slice(key.as_bytes());
    text.push(b'=');
    text.extend_from_slice(value.as_bytes());
    text.push(0);
}

/// A binary value as text: `0x` and hexadecimal digits.
pub fn encode_binary(bytes: &[u8]) -> String {
    let mut text = String::from("0x");
    for byte in bytes {
        for nibble in [byte >> 4, byte & 0xf] {
            text.push(char::from_digit(nibble.into(), 16).expect("a nibble is a digit"));
        }
    }
    text
}

/// The bytes of a binary value: hexadecimal after `0x`, base64 after `0b`. `None` if it is neither, or
/// longer than [`BINARY_BYTES_MAX`].
pub fn decode_binary(text: &str) -> Option<Vec<u8>> {
    let (kind, digits) = text.split_at_checked(2)?;
    let bytes = match kind {
        "0x" | "0X" => decode_hexadecimal(digits)?,
        "0b" | "0B" => STANDARD.decode(digits).ok()?,
        _ => return None,
    };
    (bytes.len() <= BINARY_BYTES_MAX).then_some(bytes)
}

/// An odd number of digits means a leading zero.
fn decode_hexadecimal(digits: &str) -> Option<Vec<u8>> {
    let values = digits.chars().map(|c| c.to_digit(16).and_then(|value| u8::try_from(value).ok()));
    let mut nibbles = values.collect::<Option<Vec<u8>>>()?;
    if nibbles.len() % 2 == 1 {
        nibbles.insert(0, 0);
    }
    Some(nibbles.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

/// A number of RFC 7143 §6.1: decimal or hexadecimal.
pub fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pairs_come_in_order_and_values_may_hold_anything() {
        let text = b"A=1\0B=x=y\0\0C=\0";
        assert_eq!(pairs(text), Ok(vec![("A", "1"), ("B", "x=y"), ("C", "")]));
        assert_eq!(pairs(b"A=1"), Ok(vec![("A", "1")]));
    }

    #[test]
    fn what_is_no_pair_is_refused() {
        assert_eq!(pairs(b"A\0"), Err(TextError::NotAPair));
        assert_eq!(pairs(b"=1\0"), Err(TextError::NotAPair));
        assert_eq!(pairs(&[0xff, b'=', 0]), Err(TextError::NotUtf8));
        assert_eq!(pairs(&[b'x'; 64]), Err(TextError::NotAPair));
    }

    #[test]
    fn binary_values_come_in_both_forms() {
        assert_eq!(decode_binary("0x0aFf"), Some(vec![0x0a, 0xff]));
        assert_eq!(decode_binary("0xabc"), Some(vec![0x0a, 0xbc]));
        assert_eq!(decode_binary("0bCv8="), Some(vec![0x0a, 0xff]));
        assert_eq!(decode_binary("0aff"), None);
        assert_eq!(decode_binary("0xzz"), None);
        assert_eq!(decode_binary(&encode_binary(&[7; 1025])), None);
    }

    proptest! {
        #[test]
        fn binary_values_survive(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert_eq!(decode_binary(&encode_binary(&bytes)), Some(bytes));
        }

        #[test]
        fn foreign_text_never_panics(text: Vec<u8>, string: String) {
            let _ = pairs(&text);
            let _ = decode_binary(&string);
            let _ = number(&string);
        }
    }
}
