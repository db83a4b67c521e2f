//! VMs as operations: created on an image, exported if that is asked for, and destroyed with all that is theirs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use block::{ImageId, VmName};

use super::clones::Clones;
use super::idle::IdleImages;
use super::images::ImageService;
use crate::exports::Exports;
use crate::images::retention::Destroy;
use crate::vms::{DISKS_MAX, ImageDisk, Vms};
use control::api::compute::{CreateVm, Vm as VmView};
use control::api::export::{ExportAccess, ExportName, ExportView};
use control::refusal::{Code, Refusal};

/// Creates and destroys the VMs of a node.
pub(crate) struct VmService {
    pub(crate) vms: Arc<Vms>,
    exports: Arc<Exports>,
    images: Arc<ImageService>,
    idle: Arc<IdleImages>,
    clones: Arc<Clones>,
}

impl VmService {
    /// Those of this node.
    pub(crate) fn new(
        vms: Arc<Vms>,
        exports: Arc<Exports>,
        images: Arc<ImageService>,
        idle: Arc<IdleImages>,
        clones: Arc<Clones>,
    ) -> VmService {
        VmService { vms, exports, images, idle, clones }
    }

    /// Gives a VM its disk, and exports it if that is asked for.
    pub(crate) async fn create(&self, name: &VmName, request: &CreateVm) -> Result<VmView, Refusal> {
        let asked = Instant::now();
        let export = ExportName::Vm(name.clone());
        let access = request.iscsi.clone().map(ExportAccess::Iscsi);
        if let Some(access) = &access {
            self.exports.check(&export, access)?;
        }
        let known = self.vms.get(name).is_ok();
        let vm = match &request.settle_on {
            Some(own) => {
                let carried = self.images.attach_transfer(&request.image).await?;
                self.clones.create_rebasing(name, Arc::clone(&carried), own, asked).await?
            }
            None => self.create_on_images(name, request, asked).await?,
        };
        match access {
            Some(access) if known => drop(self.exports.start(&export, access).await?),
            Some(access) => self.export_created(name, access).await?,
            None => {}
        }
        Ok(vm)
    }

    async fn create_on_images(
        &self,
        name: &VmName,
        request: &CreateVm,
        asked: Instant,
    ) -> Result<VmView, Refusal> {
        let CreateVm { image, size_bytes, further_disks, .. } = request;
        if further_disks.len() >= DISKS_MAX {
            let message = format!("a VM has at most {DISKS_MAX} disks, not {}", further_disks.len() + 1);
            return Err(Refusal::new(Code::BadVm, message));
        }
        let further = further_disks.iter().map(|disk| (&disk.image, disk.size_bytes));
        let (mut held, mut disks) = (Vec::new(), Vec::new());
        for (image, size_bytes) in std::iter::once((image, *size_bytes)).chain(further) {
            let guard = self.images.attach(image).await?;
            disks.push(ImageDisk { image: image.clone(), attached: Arc::clone(&guard), size_bytes });
            held.push(guard);
        }
        self.vms.create(name, disks, asked).await
    }

    /// Exports the disk of a VM that was just created. The VM goes again if that fails.
    pub(crate) async fn export_created(&self, name: &VmName, access: ExportAccess) -> Result<(), Refusal> {
        let exported = self.exports.start(&ExportName::Vm(name.clone()), access).await;
        if exported.is_err() {
            self.remove(name).await?;
        }
        exported.map(drop)
    }

    /// Lets others open a VM's disk, or an image, which is attached for that.
    pub(crate) async fn export(
        &self,
        name: &ExportName,
        access: ExportAccess,
    ) -> Result<ExportView, Refusal> {
        self.exports.check(name, &access)?;
        let _held = match name {
            ExportName::Vm(vm) => self.vms.get(vm).map(|_| None)?,
            ExportName::Image(image) => Some(self.images.attach(image).await?),
        };
        self.exports.start(name, access).await
    }

    /// Removes a VM with its disk and its exports. A running guest is ended.
    pub(crate) async fn destroy(&self, name: &VmName, destroy: Destroy) -> Result<(), Refusal> {
        let images: BTreeSet<ImageId> =
            self.vms.get(name)?.disks().iter().map(|disk| disk.top().chain().1.id).collect();
        self.exports.stop(&ExportName::Vm(name.clone())).await?;
        // Before nobody uses it.
        if destroy == Destroy::InstanceOnly {
            for image in &images {
                self.idle.note_destroy(image, destroy).await;
            }
        }
        self.remove(name).await?;
        if destroy == Destroy::WithImage {
            for image in &images {
                self.idle.note_destroy(image, destroy).await;
            }
        }
        Ok(())
    }

    async fn remove(&self, name: &VmName) -> Result<(), Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let vm = self.vms.get_at_rest(name)?;
        if let Some(guest) = vm.running() {
            guest
                .kill()
                .await
                .map_err(|e| Refusal::internal(format!("cannot end the guest of '{name}': {e}")))?;
        }
        let removed = self.vms.remove_files(vm.record()).await;
        // As long as its record is there, the VM is.
        if !self.vms.has_files(name) {
            self.vms.remove(name);
        }
        removed
    }
}
