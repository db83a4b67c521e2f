//! The bodies of a node's API that are about qcow2 files.

use std::path::PathBuf;

use block::{ImageName, SnapshotName, VmName};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::compute::{SnapshotTaken, TakeSnapshot, Vm};
use super::export::IscsiAccess;

/// Writes a snapshot as a qcow2 file.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ExportSnapshot {
    /// The file on the node, absolute. It must not exist.
    #[schema(value_type = String)]
    pub to: PathBuf,
    /// What the file builds upon.
    #[serde(default)]
    pub backing: ExportBacking,
    /// Takes the snapshot first, which must not exist then. It is given up again if it cannot be written.
    #[serde(default)]
    pub take: Option<TakeSnapshot>,
}

/// What an exported file builds upon.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExportBacking {
    /// The image, as it can be opened on the node: by the origin's own file, or over NBD.
    #[default]
    Image,
    /// The image, by another name. Nothing is opened by it.
    Named {
        /// A path, absolute or relative to the directory of the file, or a URI.
        name: String,
        /// Its format; if absent, what the name's ending says, else raw.
        format: Option<String>,
    },
    /// Nothing: the whole disk is in the file.
    Nothing,
}

/// A snapshot was written as a qcow2 file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotExported {
    /// The VM.
    #[schema(value_type = String)]
    pub vm: VmName,
    /// The snapshot.
    #[schema(value_type = String)]
    pub snapshot: SnapshotName,
    /// What taking it cost, if that was asked for.
    pub taken: Option<SnapshotTaken>,
    /// The file on the node.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Size of the disk in it.
    pub size_bytes: u64,
    /// Bytes of disk that are in it as data.
    pub data_bytes: u64,
    /// Length of the file.
    pub file_bytes: u64,
    /// What it builds upon, as it is named in it.
    pub backing: Option<BackingFile>,
}

/// A file that another builds upon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BackingFile {
    /// Its name, as it stands in the other one.
    pub name: String,
    /// Its format, if that is told.
    pub format: Option<String>,
}

/// Gives a VM a disk that goes on where a qcow2 file ends.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ImportVm {
    /// The image that the file was made on.
    #[schema(value_type = String)]
    pub image: ImageName,
    /// The file on the node, absolute.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// Who may open the disk over iSCSI; nobody if absent.
    #[serde(default)]
    pub iscsi: Option<IscsiAccess>,
}

/// A VM has its disk from a qcow2 file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmImported {
    /// The VM.
    #[serde(flatten)]
    pub vm: Vm,
    /// What the file says that it was made on.
    pub backing: BackingFile,
    /// Bytes of disk that came from the file, zeroes included.
    pub imported_bytes: u64,
}
