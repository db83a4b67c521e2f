//! Snapshots as qcow2 files for other programs, and VMs' disks from such files. Of a VM with several disks it is the one
//! that its guest boots from.
//!
//! A snapshot is written whole, or as what its layers hold over the image that its disk stands on. A disk from a file is
//! one new layer on the image that the file was made on.
//!
//! Consistency: what is written is frozen, whatever the VM does meanwhile, and held, so that the snapshot may be given
//! up and the VM destroyed. Cancellation: when the client hangs up; like any failure that leaves nothing behind, neither
//! a file nor a VM nor a snapshot that was taken for this. Crash: a layer that no VM names is swept away, and a file
//! that was being written has no name. Retries: none.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use block::limits::CHUNK_BYTES;
use block::{ChunkIndex, SnapshotName, VmName};
use image::{
    BACKING_NAME_MAX, Backing, ExportError, Exported, Format, ImportError, ImportProgress, Keep, Qcow2Layer,
    Qcow2Request, TakeOverError, difference,
};
use tokio::runtime::Handle;

use super::clones::union;
use super::images::ImageService;
use super::vms::VmService;
use crate::disks::DiskRecord;
use crate::exports::Exports;
use crate::images::Attached;
use crate::layers::{Below, HeldLayer, Layer, LayerId};
use crate::vms::snapshots::{Quiesce, Snapshots};
use crate::vms::{NewDisk, NewVm, Vms};
use control::api::compute::Vm as VmView;
use control::api::export::{ExportAccess, ExportName};
use control::api::qcow2::{
    BackingFile, ExportBacking, ExportSnapshot, ImportVm, SnapshotExported, VmImported,
};
use control::refusal::{Code, Refusal};

/// Writes VMs' disks to files and reads them from files.
pub(crate) struct Qcow2Files {
    vms: Arc<Vms>,
    snapshots: Arc<Snapshots>,
    images: Arc<ImageService>,
    service: Arc<VmService>,
    exports: Arc<Exports>,
}

impl Qcow2Files {
    /// Those of these VMs.
    pub(crate) fn new(
        snapshots: Arc<Snapshots>,
        images: Arc<ImageService>,
        service: Arc<VmService>,
        exports: Arc<Exports>,
    ) -> Qcow2Files {
        Qcow2Files { vms: Arc::clone(&service.vms), snapshots, images, service, exports }
    }

    /// Writes a snapshot as a qcow2 file.
    pub(crate) async fn export_snapshot(
        &self,
        name: &VmName,
        snapshot: &SnapshotName,
        request: ExportSnapshot,
        progress: Arc<ImportProgress>,
    ) -> Result<SnapshotExported, Refusal> {
        let ExportSnapshot { to, backing, take } = request;
        self.must_be_new_file(&to)?;
        let taken = match take {
            Some(take) => Some(self.snapshots.take(name, snapshot, Quiesce::of(take.quiesce)).await?),
            None => None,
        };
        let record = self.vms.get(name)?.record();
        let disk = record.boot_disk();
        let layer = self.snapshots.hold(name, snapshot, &disk.id).await?;
        let id = layer.id();
        let written = self.write_layer(disk, &layer, to.clone(), &backing, progress).await;
        // As long as the layer is held, the snapshot is no other.
        if written.is_err()
            && taken.is_some()
            && let Err(error) = self.snapshots.delete_if_there(name, id).await
        {
            tracing::warn!(vm = %name, %snapshot, %error, "leftovers_kept: a snapshot was not written to its file");
        }
        let (exported, backing) = written?;
        tracing::info!(vm = %name, %snapshot, file = %to.display(), bytes = exported.file_bytes, "snapshot_exported");
        Ok(SnapshotExported {
            vm: name.clone(),
            snapshot: snapshot.clone(),
            taken,
            path: to,
            size_bytes: exported.size_bytes,
            data_bytes: exported.data_bytes,
            file_bytes: exported.file_bytes,
            backing: backing.map(|Backing { name, format }| BackingFile { name, format: Some(format) }),
        })
    }

    /// Refuses, before anything is done, a file that could not be written or that the node would remove.
    fn must_be_new_file(&self, path: &Path) -> Result<(), Refusal> {
        if !path.is_absolute() {
            return Err(Refusal::new(
                Code::RelativePath,
                format!(
                    "'{}' is not an absolute path, and the node has no directory to take it from",
                    path.display()
                ),
            ));
        }
        if path.symlink_metadata().is_ok() {
            return Err(export_refused(&ExportError::Exists(path.to_owned())));
        }
        let dir = path.parent().unwrap_or(path).canonicalize().map_err(|error| {
            let (path, reason) = (path.to_owned(), error.to_string());
            export_refused(&ExportError::Unwritable { path, reason })
        })?;
        if dir.starts_with(self.vms.layout.dir()) {
            return Err(Refusal::new(
                Code::OwnDirectory,
                format!("'{}' lies in the node's own directory, where only the node writes", path.display()),
            )
            .with_hint("write to another directory"));
        }
        Ok(())
    }

    async fn write_layer(
        &self,
        record: &DiskRecord,
        layer: &HeldLayer,
        path: PathBuf,
        choice: &ExportBacking,
        progress: Arc<ImportProgress>,
    ) -> Result<(Exported, Option<Backing>), Refusal> {
        let backing = self.backing(record, choice)?;
        let data = match &backing {
            Some(_) => ranges_over_image(layer).await?,
            None => std::iter::once(0..record.size_bytes).collect(),
        };
        let disk = Arc::<Layer>::clone(layer) as _;
        let request = Qcow2Request { path, disk, runtime: Handle::current(), data, backing: backing.clone() };
        let written = tokio::task::spawn_blocking(move || image::write_qcow2(&request, &progress));
        let written = written.await.map_err(|e| Refusal::internal(e.to_string()))?;
        Ok((written.map_err(|error| export_refused(&error))?, backing))
    }

    /// What a file with a disk builds upon.
    fn backing(&self, record: &DiskRecord, choice: &ExportBacking) -> Result<Option<Backing>, Refusal> {
        match choice {
            ExportBacking::Nothing => Ok(None),
            ExportBacking::Named { name, format } => {
                let format = match format {
                    Some(format) => format.parse(),
                    None => Ok(format_by_name(name)),
                };
                let format: Format = format
                    .map_err(|e: image::ParseFormatError| Refusal::new(Code::BadFormat, e.to_string()))?;
                Ok(Some(Backing { name: name.clone(), format: format.to_string() }))
            }
            ExportBacking::Image => {
                let attached =
                    self.images.images.by_id(&record.image_id).ok_or_else(|| {
                        Refusal::internal(format!("image '{}' is not attached", record.image))
                    })?;
                Ok(Some(origin_file(&attached).unwrap_or_else(|| {
                    let names = attached.names();
                    let name = names.iter().find(|name| **name == record.image).or(names.first());
                    let uri = self.images.images.export_uri(name.unwrap_or(&record.image));
                    Backing { name: uri, format: Format::Raw.to_string() }
                })))
            }
        }
    }

    /// Gives a new VM a disk that goes on where a qcow2 file ends.
    pub(crate) async fn import_vm(
        &self,
        name: &VmName,
        request: ImportVm,
        progress: Arc<ImportProgress>,
    ) -> Result<VmImported, Refusal> {
        let asked = Instant::now();
        let export = ExportName::Vm(name.clone());
        let access = request.iscsi.clone().map(ExportAccess::Iscsi);
        if let Some(access) = &access {
            self.exports.check(&export, access)?;
        }
        self.vms.must_be_free(name)?;
        let attached = self.images.attach(&request.image).await?;
        let file = open(request.file.clone()).await?;
        let backing = must_fit(&file, &request, attached.root.size_bytes())?;
        let (image_id, size_bytes) = (attached.id, file.size_bytes());
        let layer = self
            .snapshots
            .make_above(LayerId::draw(), Below::Image(Arc::clone(&attached)), size_bytes)
            .await?;
        let imported_bytes = take_over(file, &layer, progress).await?;
        let disk = NewDisk { image: request.image, image_id, size_bytes };
        let new = NewVm { name: name.clone(), disks: vec![disk] };
        let vm = self.create_imported(new, layer, asked).await?;
        if let Some(access) = access {
            self.service.export_created(name, access).await?;
        }
        tracing::info!(vm = %name, file = %request.file.display(), bytes = imported_bytes, "disk_imported");
        Ok(VmImported { vm, backing, imported_bytes })
    }

    /// Creates a VM whose disk has `top` as its only layer.
    async fn create_imported(&self, new: NewVm, top: HeldLayer, asked: Instant) -> Result<VmView, Refusal> {
        let _one_at_a_time = self.vms.lock(&new.name).lock().await;
        self.vms.must_be_free(&new.name)?;
        let vm = self.vms.add(new, Some(top.id()), move |_| Ok(vec![top]), asked).await?;
        Ok(self.vms.describe(&vm))
    }
}

/// The ranges of bytes in which a frozen layer may differ from the image that its disk stands on.
async fn ranges_over_image(layer: &HeldLayer) -> Result<Vec<Range<u64>>, Refusal> {
    let (layers, _) = layer.chain();
    // Asked before the layers are: what is taken over meanwhile is in one of the two.
    let carried = match layers.last().map(|lowest| lowest.below()) {
        Some(Below::Carried { image, base, .. }) => {
            let differing = difference(&base.volume, &image.volume).await.map_err(|error| {
                Refusal::new(Code::NoManifest, format!("the disk is still being taken over: {error}"))
                    .with_hint("try again when the node that it comes from can be reached")
            })?;
            differing.into_iter().map(bytes_of).collect()
        }
        Some(Below::Layer(_) | Below::Image(_)) | None => Vec::new(),
    };
    let own = layers.iter().map(|layer| layer.overlay().own_ranges());
    Ok(union(own.chain([carried])))
}

fn bytes_of(chunks: Range<ChunkIndex>) -> Range<u64> {
    chunks.start.0 * CHUNK_BYTES as u64..chunks.end.0 * CHUNK_BYTES as u64
}

/// The file that an origin reads an image from, if other programs can open it: unlike an export, it is there also
/// while no daemon runs.
fn origin_file(attached: &Attached) -> Option<Backing> {
    let origin = attached.origin()?.describe();
    // A copy goes with the image, and is nobody's but the node's. A remote disk is not a path.
    let is_users = origin.keep == Keep::InPlace && origin.path.is_absolute();
    let name = origin.path.to_str().filter(|name| is_users && name.len() <= BACKING_NAME_MAX)?;
    Some(Backing { name: name.to_owned(), format: origin.format.to_string() })
}

/// The format that the ending of a file's name stands for; what it does not tell is raw.
fn format_by_name(name: &str) -> Format {
    let ending = if name.contains("://") { None } else { Path::new(name).extension() };
    let format = ending.and_then(|ending| ending.to_str()?.to_ascii_lowercase().parse().ok());
    format.unwrap_or(Format::Raw)
}

fn export_refused(error: &ExportError) -> Refusal {
    let message = error.to_string();
    match error {
        ExportError::Exists(_) => Refusal::new(Code::FileExists, message),
        ExportError::BackingName(_) => Refusal::new(Code::BadBacking, message),
        ExportError::NoSpace(_) => Refusal::new(Code::NoSpace, message),
        ExportError::Unwritable { .. } => Refusal::new(Code::Unwritable, message),
        ExportError::Disk(_) | ExportError::Empty | ExportError::Cancelled => Refusal::internal(message),
    }
}

/// Opens a file to be imported, without what it builds upon.
async fn open(path: PathBuf) -> Result<Qcow2Layer, Refusal> {
    let opened = tokio::task::spawn_blocking(move || Qcow2Layer::open(&path)).await;
    opened.map_err(|e| Refusal::internal(e.to_string()))?.map_err(|error| match error {
        ImportError::WrongFormat { path, .. } => whole_disk(&path, "is not a qcow2 file"),
        other => file_refused(&other),
    })
}

/// Refuses a file that cannot go on where the image ends. Gives what it says that it was made on.
fn must_fit(file: &Qcow2Layer, request: &ImportVm, image_bytes: u64) -> Result<BackingFile, Refusal> {
    let (path, image, size_bytes) = (&request.file, &request.image, file.size_bytes());
    let Some(name) = file.backing() else {
        return Err(whole_disk(
            path,
            "has no backing file: it is a whole disk, not what was written on an image",
        ));
    };
    if size_bytes < image_bytes {
        let message = format!(
            "'{}' holds a disk of {size_bytes} bytes, which is smaller than image '{image}' of {image_bytes} bytes: it was not made on that",
            path.display()
        );
        return Err(Refusal::new(Code::DiskTooSmall, message)
            .with_hint("name the image that it was made on, or enlarge it with 'qemu-img resize'"));
    }
    Ok(BackingFile { name: name.to_owned(), format: file.backing_format().map(str::to_owned) })
}

fn whole_disk(path: &Path, why: &str) -> Refusal {
    let path = path.display();
    Refusal::new(Code::NoOverlay, format!("'{path}' {why}"))
        .with_hint(format!("'virtman image add NAME {path}' makes an image of a whole disk"))
}

fn file_refused(error: &ImportError) -> Refusal {
    Refusal::new(Code::BadFile, error.to_string())
}

/// Writes what the file has of its own into a layer that nobody uses yet.
async fn take_over(
    file: Qcow2Layer,
    layer: &HeldLayer,
    progress: Arc<ImportProgress>,
) -> Result<u64, Refusal> {
    let (overlay, runtime) = (Arc::clone(layer.overlay()), Handle::current());
    let taken = tokio::task::spawn_blocking(move || image::take_over(&file, &*overlay, &runtime, &progress));
    let taken = taken.await.map_err(|e| Refusal::internal(e.to_string()))?;
    taken.map_err(|error| match error {
        TakeOverError::File(error) => file_refused(&error),
        TakeOverError::Disk(error) => error.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backing_file_has_the_format_that_its_name_ends_with_and_else_raw() {
        let names = ["base.qcow2", "/a/b.VMDK", "x.vhdx", "base.raw", "base.img", "base", "nbd://h/x.qcow2"];
        let formats = names.map(|name| format_by_name(name).to_string());
        assert_eq!(formats, ["qcow2", "vmdk", "vhdx", "raw", "raw", "raw", "raw"]);
    }
}
