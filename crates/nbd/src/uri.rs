//! Addresses of NBD servers: `nbd://host:port/export`, `nbds://…`, `nbd+unix:///export?socket=path`,
//! `nbds+unix://…`, as in the NBD project's `doc/uri.md`.
//!
//! Of the query parameters, `socket` and `tls-hostname` are taken; any other is refused by name, because
//! an address that asks for more than it gets would be trusted wrongly.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use tokio::net::{TcpStream, UnixStream};

use crate::stream::{BoxStream, Dial};

/// The port that IANA gave to NBD.
pub const PORT_DEFAULT: u16 = 10809;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A TCP port of a host, given by name or number; an IPv6 address stands without brackets.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// A UNIX socket.
    Unix(PathBuf),
}

/// Whether TLS is demanded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UriTls {
    /// Plain text.
    Off,
    /// TLS, with a server whose certificate names this host, or the one that was dialled.
    On {
        /// The name in `tls-hostname`.
        host: Option<String>,
    },
}

/// A parsed address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUri {
    /// Where the server listens.
    pub address: Address,
    /// Name of the export; empty for the default export.
    pub export: String,
    /// Whether TLS is demanded.
    pub tls: UriTls,
}

/// A text is not an address of an NBD export.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{uri}' is not an NBD address: {why}; use nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH, \
     with nbds in place of nbd for TLS"
)]
pub struct UriError {
    uri: String,
    why: String,
}

impl NbdUri {
    /// Opens connections to this address. TLS is not its concern, see [`Options`](crate::Options).
    pub fn dial(&self) -> Dial {
        let address = self.address.clone();
        Arc::new(move || {
            let address = address.clone();
            Box::pin(async move {
                let stream: BoxStream = match address {
                    Address::Tcp { host, port } => {
                        let stream = TcpStream::connect((host, port)).await?;
                        // Requests are small and someone waits for each.
                        stream.set_nodelay(true)?;
                        Box::new(stream)
                    }
                    Address::Unix(path) => Box::new(UnixStream::connect(path).await?),
                };
                Ok(stream)
            })
        })
    }
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<NbdUri, UriError> {
        parse(text).map_err(|why| UriError {
            uri: text.chars().take(200).flat_map(char::escape_debug).collect(),
            why,
        })
    }
}

fn parse(text: &str) -> Result<NbdUri, String> {
    let (scheme, rest) = text.split_once("://").ok_or("it has no '://'")?;
    let (unix, secure) = match scheme {
        "nbd" => (false, false),
        "nbds" => (false, true),
        "nbd+unix" => (true, false),
        "nbds+unix" => (true, true),
        _ => return Err(format!("its scheme is '{}'", scheme.escape_debug())),
    };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    let (mut socket, mut tls_host) = (None, None);
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match key {
            "socket" => socket = Some(decode(value)?),
            "tls-hostname" if secure => tls_host = Some(decode(value)?),
            _ => return Err(format!("the parameter '{}' is not supported", key.escape_debug())),
        }
    }
    let address = match (unix, socket) {
        (true, Some(path)) if authority.is_empty() && !path.is_empty() => Address::Unix(path.into()),
        (true, Some(_)) if !authority.is_empty() => {
            return Err("a UNIX socket has no host: write three slashes".to_owned());
        }
        (true, _) => return Err("the parameter 'socket' is missing".to_owned()),
        (false, Some(_)) => return Err("'socket' goes with nbd+unix".to_owned()),
        (false, None) => tcp(authority)?,
    };
    let tls = if secure { UriTls::On { host: tls_host } } else { UriTls::Off };
    Ok(NbdUri { address, export: decode(export)?, tls })
}

fn tcp(authority: &str) -> Result<Address, String> {
    if authority.contains('@') {
        return Err("user names are not supported".to_owned());
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(v6) => {
            let (host, rest) = v6.split_once(']').ok_or("its '[' is not closed")?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| "there is no IPv6 address in its brackets")?;
            let port = match rest.strip_prefix(':') {
                Some(port) => Some(port),
                None if rest.is_empty() => None,
                None => return Err("something follows its ']'".to_owned()),
            };
            (host, port)
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    if host.is_empty() {
        return Err("the host is missing".to_owned());
    }
    let port = match port {
        None | Some("") => PORT_DEFAULT,
        // `parse` alone would take a sign.
        Some(text) if text.bytes().all(|b| b.is_ascii_digit()) => {
            text.parse().map_err(|_| "its port is above 65535")?
        }
        Some(_) => return Err("its port is not a number".to_owned()),
    };
    Ok(Address::Tcp { host: decode(host)?, port })
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Result<String, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16));
            let (Some(high), Some(low)) = (digit(), digit()) else {
                return Err("a '%' is not followed by two hexadecimal digits".to_owned());
            };
            out.push((high * 16 + low) as u8);
        } else {
            out.push(byte);
        }
    }
    if out.contains(&0) {
        return Err("it contains a zero byte".to_owned());
    }
    String::from_utf8(out).map_err(|_| "it is not UTF-8".to_owned())
}

fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte) {
            out.push(byte.into());
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (s, tls_host) = match &self.tls {
            UriTls::Off => ("", None),
            UriTls::On { host } => ("s", host.as_deref()),
        };
        let mut query = Vec::new();
        match &self.address {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "nbd{s}://[{host}]:{port}")?,
            Address::Tcp { host, port } => write!(f, "nbd{s}://{}:{port}", encode(host))?,
            Address::Unix(path) => {
                query.push(format!("socket={}", encode(&path.to_string_lossy())));
                write!(f, "nbd{s}+unix://")?;
            }
        }
        query.extend(tls_host.map(|host| format!("tls-hostname={}", encode(host))));
        write!(f, "/{}", encode(&self.export))?;
        if query.is_empty() { Ok(()) } else { write!(f, "?{}", query.join("&")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp_uri(host: &str, port: u16, export: &str) -> NbdUri {
        NbdUri {
            address: Address::Tcp { host: host.to_owned(), port },
            export: export.to_owned(),
            tls: UriTls::Off,
        }
    }

    #[test]
    fn the_examples_of_the_document_mean_what_it_says() {
        let examples = [
            ("nbd://example.com:10810/disk", tcp_uri("example.com", 10810, "disk")),
            ("nbd://example.com/disk", tcp_uri("example.com", 10809, "disk")),
            ("nbd://example.com/", tcp_uri("example.com", 10809, "")),
            ("nbd://example.com", tcp_uri("example.com", 10809, "")),
            ("nbd://example.com//disk", tcp_uri("example.com", 10809, "/disk")),
            ("nbd://example.com/hello%20world", tcp_uri("example.com", 10809, "hello world")),
            ("nbd://[::1]:1/x", tcp_uri("::1", 1, "x")),
        ];
        for (text, expected) in examples {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        let unix = NbdUri {
            address: Address::Unix("/run/a b.sock".into()),
            export: "disk".to_owned(),
            tls: UriTls::On { host: Some("origin".to_owned()) },
        };
        assert_eq!("nbds+unix:///disk?socket=/run/a%20b.sock&tls-hostname=origin".parse(), Ok(unix));
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_not_ignored() {
        for bad in [
            "",
            "nbd:/x",
            "http://x/",
            "nbd:///disk",
            "nbd://host:99999/",
            "nbd://host:+1/",
            "nbd://me@host/",
            "nbd://[::1/",
            "nbd://[x]/",
            "nbd://host/?socket=/x",
            "nbd://host/?tls-hostname=x",
            "nbds://host/?tls-verify-peer=0",
            "nbds://host/?tls-type=psk",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=",
            "nbd+unix://host/x?socket=/y",
            "nbd+unix:///x?socket=%00abstract",
            "nbd://host/%zz",
            "nbd://host/%c3",
        ] {
            assert!(bad.parse::<NbdUri>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn an_address_survives_its_text_form(
            unix: bool, secure: bool, host in "[a-z0-9]{1,9}", port: u16, export in "[^\0]{0,20}",
            path in "/[^\0]{1,20}",
        ) {
            let address =
                if unix { Address::Unix(path.into()) } else { Address::Tcp { host: host.clone(), port } };
            let tls = if secure { UriTls::On { host: Some(host) } } else { UriTls::Off };
            let uri = NbdUri { address, export, tls };
            prop_assert_eq!(uri.to_string().parse::<NbdUri>(), Ok(uri));
        }

        #[test]
        fn foreign_text_never_panics(text in "(nbds?(\\+unix)?://)?.*") {
            let _ = text.parse::<NbdUri>();
        }
    }
}
