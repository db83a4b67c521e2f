//! What VMs are there when the daemon starts: their disks are opened, and the guests that outlived it are adopted.
//!
//! Crash: what lies in the directory of VMs without a record is what an unfinished create, destroy or move left, and is
//! removed. What cannot be opened is said and left as it is.

use std::fs;
use std::io;
use std::sync::Arc;

use futures_util::future::join_all;

use crate::migration::source::OutgoingVms;
use crate::migration::target::{self, IncomingRecord, Phase};
use crate::state;
use crate::vms::guests::Guests;
use crate::vms::{self, Vm, VmRecord, Vms, watch};
use qemu::Qemu;

/// What was found when the daemon started.
pub(crate) struct Restored {
    /// Whether all records could be read: if so, all layers are counted that they name.
    pub(crate) complete: bool,
    /// VMs that other nodes were about to bring.
    pub(crate) incoming: Vec<IncomingRecord>,
}

/// Opens the disks that were there when the daemon ended, and finds the guests that still run.
pub(crate) async fn restore(vms: &Vms, guests: &Guests, outgoing: &OutgoingVms) -> io::Result<Restored> {
    let mut restored = Restored { complete: true, incoming: Vec::new() };
    let mut records = Vec::new();
    for dir in state::sweep(&vms.layout.vms())? {
        if state::is_absent(&dir.join(vms::RECORD)) {
            if state::is_absent(&dir.join(target::RECORD)) {
                tracing::info!(dir = %dir.display(), "leftovers_removed: a create or destroy was not finished");
                fs::remove_dir_all(&dir)?;
                continue;
            }
            match state::read_record::<IncomingRecord>(&dir.join(target::RECORD)) {
                Ok(coming) if coming.phase == Phase::Ready => {
                    vms.layers.add_refs(coming.record.layers());
                    restored.incoming.push(coming);
                }
                Ok(_) => {
                    tracing::info!(dir = %dir.display(), "leftovers_removed: a move was not finished");
                    target::end_guest(&dir).await;
                    fs::remove_dir_all(&dir)?;
                }
                Err(reason) => {
                    restored.complete = false;
                    tracing::error!(dir = %dir.display(), reason, "vm_not_restored: it was coming; its files are left as they are");
                }
            }
            continue;
        }
        match state::read_record::<VmRecord>(&dir.join(vms::RECORD)) {
            Ok(record) => {
                vms.layers.add_refs(record.layers());
                records.push(record);
            }
            Err(reason) => {
                restored.complete = false;
                tracing::error!(dir = %dir.display(), reason, "vm_not_restored: its record is damaged; its files are left as they are");
            }
        }
    }
    let mut opened = Vec::new();
    for record in records {
        let name = record.name.clone();
        if record.moved_to.is_some() {
            target::end_guest(&vms.dir(&name)).await;
            outgoing.restore(record);
            continue;
        }
        match open(vms, record) {
            Ok(vm) => {
                vms.insert(Arc::clone(&vm));
                opened.push(vm);
            }
            Err(reason) => {
                tracing::error!(vm = %name, reason, "vm_not_restored: its disk cannot be opened; its files are left as they are");
            }
        }
    }
    // Side by side, since QEMU may keep each waiting for a while.
    join_all(opened.iter().map(|vm| guests.let_arrived_go_on(vm))).await;
    Ok(restored)
}

fn open(vms: &Vms, record: VmRecord) -> Result<Arc<Vm>, String> {
    let dir = vms.dir(&record.name);
    let vm = vms.open(record)?;
    if let Some(guest) = Qemu::adopt(&dir) {
        tracing::info!(vm = %vm.name(), pid = guest.pid(), "guest_adopted: it still runs");
        guest.recover();
        watch(&vm, Arc::new(guest), dir);
    }
    Ok(vm)
}
