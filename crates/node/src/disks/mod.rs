//! Disks that VMs write to: the [layers](crate::layers) of each as one, behind an NBD socket of its own.
//!
//! A VM has one disk or several, and its record names them; what is done with a VM is done with all of them.
//!
//! Consistency: disks are [frozen](freeze_all) together, at one point: each holds every change that was answered on any
//! of them before, and none that was begun after.

mod metered;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use block::{BoxFuture, Disk as _, DiskId, ImageId, ImageName};
use futures_util::FutureExt;
use serde::{Deserialize, Serialize};
use store::{Chain, Overlay};

pub(crate) use self::metered::MeteredDisk;
use crate::layers::{Layer, LayerId};
use crate::nbd_socket::{Clients, NbdSocket};
use crate::state::sync_dir;
use control::refusal::Refusal;

/// What is remembered of a disk, in the record of its VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskRecord {
    pub(crate) id: DiskId,
    pub(crate) image: ImageName,
    pub(crate) image_id: ImageId,
    pub(crate) size_bytes: u64,
    /// The layer that takes the changes.
    pub(crate) top: LayerId,
}

/// A disk that is open, and exported over NBD.
pub(crate) struct Disk {
    pub(crate) id: DiskId,
    pub(crate) io: Arc<MeteredDisk<Chain>>,
    top: Mutex<Arc<Layer>>,
    /// What it is called over NBD.
    name: String,
    socket: PathBuf,
    export: Mutex<Option<NbdSocket>>,
}

impl Disk {
    /// The disk with this id whose topmost layer is `top`, exported as `name` at a socket in `sockets`. The record that
    /// names its top lies in `dir`.
    pub(crate) fn open(
        id: DiskId,
        top: Arc<Layer>,
        dir: &Path,
        name: String,
        sockets: &Path,
    ) -> Result<Disk, String> {
        let (layers, _) = top.chain();
        let below = layers[1..].iter().map(|layer| Arc::clone(layer.overlay())).collect();
        let dir = dir.to_owned();
        let chain = Chain::new(Arc::clone(top.overlay()), below, Box::new(move || sync_dir(&dir)));
        let disk = Disk {
            id,
            io: Arc::new(MeteredDisk::new(chain)),
            top: Mutex::new(top),
            socket: sockets.join(format!("{name}.sock")),
            name,
            export: Mutex::new(None),
        };
        disk.export()?;
        Ok(disk)
    }

    /// What it is called over NBD.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its NBD socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The NBD URI of its socket.
    pub(crate) fn uri(&self) -> String {
        NbdSocket::uri(&self.socket, &self.name)
    }

    /// Exports the disk, if it is not.
    pub(crate) fn export(&self) -> Result<(), String> {
        let mut export = self.export.lock().unwrap_or_else(PoisonError::into_inner);
        if export.is_none() {
            let (socket, disk) = (self.socket.clone(), Arc::clone(&self.io) as _);
            let opened = NbdSocket::open(socket, self.name.clone(), disk, Clients::default());
            let opened =
                opened.map_err(|e| format!("cannot open the socket {}: {e}", self.socket.display()))?;
            *export = Some(opened);
        }
        Ok(())
    }

    /// Ends all connections to the export.
    pub(crate) fn close_export(&self) {
        self.export.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// The layer that takes the changes at present.
    pub(crate) fn top(&self) -> Arc<Layer> {
        Arc::clone(&self.top.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Bytes that its layers hold, those that it shares with others included.
    pub(crate) fn private_bytes(&self) -> u64 {
        self.top().chain().0.iter().map(|layer| layer.overlay().allocated_bytes()).sum()
    }

    /// Knows the layer that takes the changes since the disk was frozen.
    fn set_top(&self, top: Arc<Layer>) {
        *self.top.lock().unwrap_or_else(PoisonError::into_inner) = top;
    }
}

/// Freezes the tops of disks at one point and puts for each the durable layer above that is given with it, which `put`
/// writes down for all of them. Says for how long changes had to wait. If it fails, all goes on as before. What was
/// written down is durable only once each disk has [settled](Chain::settle).
pub(crate) async fn freeze_all(
    disks: &[(Arc<Disk>, Arc<Layer>)],
    put: BoxFuture<'_, Result<(), Refusal>>,
) -> Result<Duration, Refusal> {
    // Once more while they stand still, when little is left.
    for (disk, _) in disks {
        disk.io.flush().await?;
    }
    let frozen = freeze_in_turn(disks, put).await;
    if frozen.is_ok() {
        for (disk, next) in disks {
            disk.set_top(Arc::clone(next));
        }
    }
    frozen
}

/// Freezes the first disk, and the others while it stands still.
fn freeze_in_turn<'a>(
    disks: &'a [(Arc<Disk>, Arc<Layer>)],
    put: BoxFuture<'a, Result<(), Refusal>>,
) -> BoxFuture<'a, Result<Duration, Refusal>> {
    let Some(((disk, next), others)) = disks.split_first() else {
        return async { put.await.map(|()| Duration::ZERO) }.boxed();
    };
    async move {
        let record = async {
            freeze_in_turn(others, put).await?;
            Ok::<Arc<Overlay>, Refusal>(Arc::clone(next.overlay()))
        };
        Ok(disk.io.inner().freeze(record).await?.pause)
    }
    .boxed()
}
