//! The bodies of a node's API that are about exports.

use std::fmt;
use std::str::FromStr;

use block::{ImageName, NodeName, VmName};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

/// What is exported: a VM's disk by its name, or an image by its name with tag.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExportName {
    /// The disk of this VM, which takes writes.
    Vm(VmName),
    /// The volume of this image, read-only.
    Image(ImageName),
}

impl ExportName {
    /// The name as part of a file's name; no VM's is an image's.
    pub fn file_name(&self) -> String {
        match self {
            ExportName::Vm(name) => name.to_string(),
            ExportName::Image(name) => name.file_name(),
        }
    }
}

impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExportName::Vm(name) => name.fmt(f),
            ExportName::Image(name) => name.fmt(f),
        }
    }
}

impl FromStr for ExportName {
    type Err = block::NameError;

    /// An image's name has a colon, and a VM's has none.
    fn from_str(text: &str) -> Result<ExportName, block::NameError> {
        if text.contains(':') {
            text.parse().map(ExportName::Image)
        } else {
            text.parse().map(ExportName::Vm)
        }
    }
}

impl Serialize for ExportName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ExportName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ExportName, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A name and a secret for CHAP. Never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ChapSecret {
    /// The name.
    pub user: String,
    /// The secret, of 12 bytes or more.
    pub secret: String,
}

impl fmt::Debug for ChapSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChapSecret").field("user", &self.user).finish_non_exhaustive()
    }
}

impl FromStr for ChapSecret {
    type Err = String;

    /// `USER:SECRET` on one line, as in the files that commands are given.
    fn from_str(text: &str) -> Result<ChapSecret, String> {
        let line = text.trim_end_matches(['\r', '\n']);
        match line.split_once(':') {
            Some((user, secret)) if !user.is_empty() && !secret.is_empty() && !line.contains('\n') => {
                Ok(ChapSecret { user: user.to_owned(), secret: secret.to_owned() })
            }
            _ => Err("it has to be one line of the form USER:SECRET".to_owned()),
        }
    }
}

/// Lets initiators on the network open a disk over iSCSI. At least one of the first three has to be there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IscsiAccess {
    /// The initiators that may; all if empty.
    #[serde(default)]
    pub initiators: Vec<String>,
    /// Whether whoever reaches the node may, without a secret.
    #[serde(default)]
    pub anyone: bool,
    /// What initiators have to prove.
    pub chap: Option<ChapSecret>,
    /// What the node proves to initiators that ask.
    pub mutual_chap: Option<ChapSecret>,
}

/// A protocol over which disks and images can be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExportProtocol {
    /// iSCSI, for initiators on the network.
    Iscsi,
    /// Network Block Device, for whoever may open a socket on the node, and for administrators over TLS.
    Nbd,
}

/// As people write it.
impl fmt::Display for ExportProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ExportProtocol::Nbd => "NBD",
            ExportProtocol::Iscsi => "iSCSI",
        })
    }
}

/// Who may open a disk, and over which protocol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "protocol", rename_all = "snake_case")]
pub enum ExportAccess {
    /// Initiators, over iSCSI.
    Iscsi(IscsiAccess),
    /// Whoever may open the socket, over NBD: all disks and images are exported so, always.
    Nbd,
}

impl ExportAccess {
    /// The protocol.
    pub fn protocol(&self) -> ExportProtocol {
        match self {
            ExportAccess::Iscsi(_) => ExportProtocol::Iscsi,
            ExportAccess::Nbd => ExportProtocol::Nbd,
        }
    }
}

impl<'de> Deserialize<'de> for ExportAccess {
    /// A request that names no protocol is for iSCSI, as all were once.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ExportAccess, D::Error> {
        let mut fields = serde_json::Map::deserialize(deserializer)?;
        let custom = |error: serde_json::Error| serde::de::Error::custom(error);
        let protocol = match fields.remove("protocol") {
            Some(protocol) => serde_json::from_value(protocol).map_err(custom)?,
            None => ExportProtocol::Iscsi,
        };
        match protocol {
            ExportProtocol::Iscsi => {
                serde_json::from_value(fields.into()).map(ExportAccess::Iscsi).map_err(custom)
            }
            ExportProtocol::Nbd => Ok(ExportAccess::Nbd),
        }
    }
}

/// A way to a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExportView {
    /// The VM or image.
    #[schema(value_type = String)]
    pub name: ExportName,
    /// The node that serves it.
    #[schema(value_type = String)]
    pub node: NodeName,
    /// How.
    pub protocol: ExportProtocol,
    /// Whether it takes no writes.
    pub read_only: bool,
    /// Where clients open it: a URI for each portal.
    pub addresses: Vec<String>,
    /// The iSCSI name of its target.
    pub target: Option<String>,
    /// The initiators that may open it; all if empty.
    pub initiators: Vec<String>,
    /// `none`, `chap` or `mutual chap`; NBD sockets are for whoever may open the file.
    pub authentication: String,
    /// Who has it open over iSCSI; NBD has no sessions.
    pub sessions: Vec<IscsiSession>,
}

/// An initiator that has a disk open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IscsiSession {
    /// What it calls itself.
    pub initiator: String,
    /// Where it comes from.
    pub from: String,
    /// The portal through which it came: its place among the addresses, from 0.
    pub portal: usize,
    /// When it logged in.
    pub since_unix_ms: u64,
    /// SCSI commands that it sent.
    pub commands: u64,
    /// Bytes that it read.
    pub read_bytes: u64,
    /// Bytes that it wrote.
    pub written_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_makes_an_image() {
        assert!(matches!("debian:12".parse(), Ok(ExportName::Image(_))));
        assert!(matches!("debian".parse(), Ok(ExportName::Vm(_))));
        assert!("a/b".parse::<ExportName>().is_err() && "a:b:c".parse::<ExportName>().is_err());
    }

    #[test]
    fn a_request_without_a_protocol_is_for_iscsi() {
        let read = |json: &str| serde_json::from_str::<ExportAccess>(json);
        let anyone = IscsiAccess { initiators: Vec::new(), anyone: true, chap: None, mutual_chap: None };
        assert_eq!(read(r#"{"anyone": true}"#).unwrap(), ExportAccess::Iscsi(anyone.clone()));
        assert_eq!(
            read(r#"{"protocol": "iscsi", "anyone": true}"#).unwrap(),
            ExportAccess::Iscsi(anyone.clone())
        );
        assert_eq!(read(r#"{"protocol": "nbd"}"#).unwrap(), ExportAccess::Nbd);
        let error = read(r#"{"protocol": "smoke"}"#).unwrap_err().to_string();
        assert!(error.contains("smoke") && error.contains("iscsi"), "{error}");
        let written = serde_json::to_string(&ExportAccess::Iscsi(anyone.clone())).unwrap();
        assert_eq!(read(&written).unwrap(), ExportAccess::Iscsi(anyone), "{written}");
    }

    #[test]
    fn a_secret_is_one_line_and_is_not_shown() {
        let secret: ChapSecret = "guest:correct:horse battery\n".parse().unwrap();
        assert_eq!((&*secret.user, &*secret.secret), ("guest", "correct:horse battery"));
        assert!(!format!("{secret:?}").contains("horse"));
        for bad in ["", "guest", ":x", "guest:", "a:b\nc:d\n"] {
            assert!(bad.parse::<ChapSecret>().is_err(), "{bad:?}");
        }
    }
}
