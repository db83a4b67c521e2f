//! Images on exports of NBD servers: `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`.

use std::sync::Arc;

use nbd::uri::{UriError, UriTls};
use nbd::{Client, ConnectError, NbdUri, Options};

use super::{Key, OpenError, Opening, Protocol, Secrets};

pub(super) const PROTOCOL: Protocol =
    Protocol { schemes: &["nbd", "nbds", "nbd+unix", "nbds+unix"], secrets: Secrets::None, open };

fn open(key: &Key) -> Opening<'_> {
    Box::pin(async move {
        let uri: NbdUri = key.location.parse().map_err(|e: UriError| OpenError::Unusable(e.to_string()))?;
        if uri.tls != UriTls::Off {
            let why = "images are read from NBD servers without TLS: use nbd:// or nbd+unix://";
            return Err(OpenError::Unusable(why.to_owned()));
        }
        match Client::connect_uri(&uri, Options::default()).await {
            Ok(disk) => Ok(Arc::new(disk) as _),
            Err(error @ (ConnectError::Io(_) | ConnectError::TooSlow)) => {
                Err(OpenError::Unreachable(error.to_string()))
            }
            Err(other) => Err(OpenError::Unusable(other.to_string())),
        }
    })
}
