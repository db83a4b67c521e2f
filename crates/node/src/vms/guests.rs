//! Guests: what runs on VMs' disks.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use block::VmName;

use super::{Vm, VmRecord, Vms, watch};
use crate::disks::Disk;
use control::api::compute::{StartVm, Vm as VmView, VmReady, VmStarted};
use control::api::unix_ms;
use control::refusal::{Code, Refusal};
use qemu::seed::SeedError;
use qemu::{Accel, AccelMode, DirectBoot, Platform, Qemu, Ready, VmDisk, VmError, VmSpec, seed};

/// Starts, watches and ends the guests of a node.
pub(crate) struct Guests {
    vms: Arc<Vms>,
    accel: AccelMode,
}

impl Guests {
    /// Guests that run as `accel` says.
    pub(crate) fn new(vms: Arc<Vms>, accel: AccelMode) -> Guests {
        Guests { vms, accel }
    }

    /// Starts a guest on a VM's disk. If one runs, that is it.
    pub(crate) async fn start(&self, name: &VmName, request: &StartVm) -> Result<VmStarted, Refusal> {
        let accel = self.accel.decide().await.map_err(|e| Refusal::internal(e.to_string()))?;
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let vm = self.vms.get_at_rest(name)?;
        let accelerator = format!("{}: {}", accel.accel, accel.reason);
        if vm.running().is_some() {
            return Ok(VmStarted { vm: self.vms.describe(&vm), accelerator });
        }
        let dir = self.vms.dir(name);
        let spec = self.spec(&vm, request, accel.accel, None)?;
        vm.reset_boot_stats();
        let qemu = Qemu::start(&dir, &spec).await.map_err(|e| match e {
            VmError::Unfit(why) => Refusal::new(Code::BadVm, why),
            other => Refusal::internal(format!("cannot start '{name}': {other}")),
        })?;
        tracing::info!(vm = %name, pid = qemu.pid(), "guest_started");
        watch(&vm, Arc::new(qemu), dir);
        let record = VmRecord { start: Some(request.clone()), ..vm.record() };
        self.vms.change(&vm, record).await?;
        Ok(VmStarted { vm: self.vms.describe(&vm), accelerator })
    }

    /// The machine that a VM's guest runs on, as it was asked for. Writes its seed disk.
    pub(crate) fn spec(
        &self,
        vm: &Vm,
        request: &StartVm,
        accel: Accel,
        platform: Option<Platform>,
    ) -> Result<VmSpec, Refusal> {
        let name = vm.name();
        let seed = write_seed(&self.vms.dir(name).join("seed.img"), &vm.record(), request)?;
        let disk = |disk: &Arc<Disk>| VmDisk {
            socket: disk.socket().to_owned(),
            export: disk.name().to_owned(),
            serial: Some(disk.id.to_string()),
        };
        Ok(VmSpec {
            name: name.clone(),
            // Guests that are moved from an older build see no serial number here.
            disk: VmDisk { serial: None, ..disk(vm.boot_disk()) },
            further_disks: vm.disks()[1..].iter().map(disk).collect(),
            seed: Some(seed),
            memory_mib: request.memory_mib,
            cpus: request.cpus,
            accel,
            boot: request.kernel.as_ref().map(|k| DirectBoot {
                kernel: k.kernel.clone(),
                initrd: k.initrd.clone(),
                append: k.append.clone(),
            }),
            forward_ports: request.forward_ports.clone(),
            on_full: request.on_full.into(),
            platform,
        })
    }

    /// How a VM's guest was started last.
    pub(crate) fn last_start(&self, name: &VmName) -> Result<StartVm, Refusal> {
        self.vms.get(name)?.record().start.ok_or_else(|| {
            Refusal::new(
                Code::NeverStarted,
                format!("no guest was ever started on the disk of '{name}' by VirtMan"),
            )
            .with_hint("'virtman boot' starts guests")
        })
    }

    /// Waits until a VM's guest is ready.
    pub(crate) async fn wait(
        &self,
        name: &VmName,
        ready: &str,
        timeout: Duration,
    ) -> Result<VmReady, Refusal> {
        let ready: Ready = ready.parse().map_err(|why: String| Refusal::new(Code::BadReady, why))?;
        let vm = self.vms.get(name)?;
        let guest = vm.running().ok_or_else(|| {
            let log = self.vms.dir(name).join("qemu.log");
            Refusal::new(Code::NotRunning, format!("'{name}' has no running guest; see {}", log.display()))
        })?;
        let ready = ready.wait(&guest, timeout).await.map_err(|e| {
            let log = self.vms.dir(name).join("console.log");
            Refusal::new(Code::NotReady, format!("'{name}': {e}; see {}", log.display()))
        })?;
        let started = unix_ms(guest.started());
        let first_read_ms = vm.boot_disk().io.first_read_unix_ms().map(|ms| ms.saturating_sub(started));
        let ready_ms = u64::try_from(ready.as_millis()).unwrap_or(u64::MAX);
        let ready = VmReady { first_read_ms, ready_ms };
        vm.note_ready(ready);
        Ok(ready)
    }

    /// Ends a VM's guest; its disk stays. Ending it again changes nothing.
    pub(crate) async fn stop(&self, name: &VmName, grace: Duration) -> Result<VmView, Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let vm = self.vms.get_at_rest(name)?;
        if let Some(guest) = vm.running() {
            let stopped = guest.stop(grace).await;
            let stopped = stopped.map_err(|e| Refusal::internal(format!("cannot stop '{name}': {e}")))?;
            vm.ended(&guest);
            tracing::info!(vm = %name, ?stopped, "guest_stopped");
        }
        Ok(self.vms.describe(&vm))
    }

    /// Lets a guest that came from another node go on, if it was not told to.
    pub(crate) async fn let_arrived_go_on(&self, vm: &Vm) {
        let record = vm.record();
        let Some(guest) = vm.running().filter(|_| record.arrived) else { return };
        if let Err(error) = guest.resume().await {
            tracing::error!(vm = %record.name, %error, "guest_not_resumed: it arrived and stands still; it is tried again and again");
            return;
        }
        let record = VmRecord { arrived: false, ..record };
        let name = record.name.clone();
        if let Err(error) = self.vms.change(vm, record).await {
            // It is told to go on once more at the next start, which does no harm.
            tracing::warn!(vm = %name, %error, "guest_resume_not_recorded");
        }
    }
}

/// Writes the NoCloud seed disk from which the guest learns who it is.
fn write_seed(file: &Path, record: &VmRecord, request: &StartVm) -> Result<PathBuf, Refusal> {
    let unfit = |e: SeedError| match e {
        SeedError::Unfit(why) => Refusal::new(Code::BadSeed, why),
        SeedError::Io(_) => Refusal::internal(e.to_string()),
    };
    // A VM that is destroyed and created anew is another instance, and configures itself anew.
    let instance = format!("i-{}", record.created_unix_ms).parse::<VmName>();
    let instance = instance.map_err(|e| Refusal::internal(e.to_string()))?;
    let mut identity = seed::Identity::new(&record.name, &instance, &request.ssh_keys).map_err(unfit)?;
    if let Some(user_data) = &request.user_data {
        identity = identity.with_user_data(user_data.as_bytes()).map_err(unfit)?;
    }
    let disk = identity.disk().map_err(unfit)?;
    tokio::task::block_in_place(|| fs::write(file, disk))
        .map_err(|e| Refusal::internal(format!("cannot write {}: {e}", file.display())))?;
    Ok(file.to_owned())
}
