//! The text of a join token, as an operator pastes it.
//!
//! The first byte says whether the rest is that text or what the text stands for, with a right checksum.

#![no_main]

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

// Taken in as a file, so that no TLS library is built and instrumented for it; most of that file is for others.
#[allow(dead_code)]
#[path = "../../crates/identity/src/token.rs"]
mod token;

use token::{ADDRESS_BYTES_MAX, Token};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((&form, rest)) = input.split_first() else { return };
    let text = if form % 2 == 0 {
        String::from_utf8_lossy(rest).into_owned()
    } else {
        let checksum = blake3::hash(rest);
        format!("vmt1_{}", URL_SAFE_NO_PAD.encode([rest, &checksum.as_bytes()[..4]].concat()))
    };
    match text.parse::<Token>() {
        Ok(token) => {
            assert!(token.address().len() <= ADDRESS_BYTES_MAX);
            assert_eq!(token.to_string(), text.trim(), "a token has one form only");
        }
        Err(error) => {
            let error = error.to_string();
            assert!(!error.contains(char::is_control), "{error:?} would garble a terminal");
        }
    }
});
