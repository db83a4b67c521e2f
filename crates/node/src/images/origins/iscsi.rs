//! Images on logical units of iSCSI targets: `iscsi://[USER@]HOST[:PORT]/TARGET/LUN`.

use std::sync::Arc;

use iscsi::Credentials;
use iscsi::initiator::{self, Address, AddressError, ConnectError, Initiator, Options};

use super::{Key, OpenError, Opening, Protocol, Secrets};
use control::api::export::ChapSecret;

pub(super) const PROTOCOL: Protocol = Protocol { schemes: &["iscsi"], secrets: Secrets::Chap, open };

fn open(key: &Key) -> Opening<'_> {
    Box::pin(async move {
        let address: Address =
            key.location.parse().map_err(|e: AddressError| OpenError::Unusable(e.to_string()))?;
        let secrets =
            initiator::Secrets { initiator: credentials(&key.chap)?, target: credentials(&key.mutual_chap)? };
        match Initiator::connect(&address, secrets, Options::default()).await {
            Ok(disk) => Ok(Arc::new(disk) as _),
            Err(error @ (ConnectError::Io(_) | ConnectError::TooSlow | ConnectError::Unready(_))) => {
                Err(OpenError::Unreachable(error.to_string()))
            }
            Err(other) => Err(OpenError::Unusable(other.to_string())),
        }
    })
}

fn credentials(secret: &Option<ChapSecret>) -> Result<Option<Credentials>, OpenError> {
    let made = secret.as_ref().map(|s| Credentials::new(&s.user, s.secret.as_bytes())).transpose();
    made.map_err(|e| OpenError::Unusable(e.to_string()))
}
