//! `create`, `destroy`, `list`, `stop` and `console`.

use std::path::Path;
use std::time::Duration;

use block::VmName;

use super::context::{Context, Failure, NodeClient, Outcome};
use super::export::Protocol;
use super::image::{absolute, follow};
use super::output::{Column, Table, note, print_json, say};
use super::{CreateArgs, StopArgs};
use control::api::compute::{CreateVm, StopVm, Vm, VmState};
use control::api::export::{ExportName, IscsiAccess};
use control::api::qcow2::{ImportVm, VmImported};
use control::units::ByteSize;
use node::Destroy;
use qemu::console;

pub(super) async fn create(context: &Context, args: &CreateArgs) -> Outcome {
    let node = context.node().await?;
    if args.export.is_none() && !args.access.is_empty() {
        return Err(Failure::new("who may open the disk over iSCSI was said, but not --export iscsi"));
    }
    let iscsi = args.export.map(|Protocol::Iscsi| args.access.access()).transpose()?;
    if let Some(file) = &args.from {
        return import(context, &node, args, file, iscsi).await;
    }
    let body = CreateVm {
        image: args.image.clone(),
        size_bytes: args.size.map(|size| size.0),
        iscsi,
        further_disks: Vec::new(),
        settle_on: None,
    };
    let vm: Vm = node.client.put(&format!("/v1/vms/{}", args.vm), &body).await?;
    if context.json() {
        print_json(&vm);
        return Ok(());
    }
    say_disk(&node, args, &vm).await
}

/// Gives a VM a disk that goes on where a file ends.
async fn import(
    context: &Context,
    node: &NodeClient,
    args: &CreateArgs,
    file: &Path,
    iscsi: Option<IscsiAccess>,
) -> Outcome {
    let body = ImportVm { image: args.image.clone(), file: absolute(file)?, iscsi };
    let path = format!("/v1/vms/{}/import", args.vm);
    let imported: VmImported =
        follow(&node.client, &path, &body, format!("importing {}", file.display())).await?;
    if context.json() {
        print_json(&imported);
        return Ok(());
    }
    let (bytes, backing) = (ByteSize(imported.imported_bytes), imported.backing.name.escape_debug());
    note(&format!("imported {bytes} onto '{}'; the file says that it was made on '{backing}'", args.image));
    say_disk(node, args, &imported.vm).await
}

/// Prints where a new disk can be opened.
async fn say_disk(node: &NodeClient, args: &CreateArgs, vm: &Vm) -> Outcome {
    say(&vm.disk);
    match args.export {
        Some(Protocol::Iscsi) => super::export::say_addresses(node, &ExportName::Vm(vm.name.clone())).await,
        None => Ok(()),
    }
}

pub(super) async fn destroy(context: &Context, vms: &[VmName], destroy: Destroy) -> Outcome {
    let query = match destroy {
        Destroy::WithImage => "",
        Destroy::InstanceOnly => "?instance_only=true",
    };
    let mut destroyed = Vec::new();
    for name in vms {
        let (node, vm) = context.find_vm(name).await?;
        node.client.delete::<()>(&format!("/v1/vms/{name}{query}")).await?;
        note(&format!("destroyed '{name}' on node {}", vm.node));
        destroyed.push(vm);
    }
    if context.json() {
        print_json(&destroyed);
    }
    Ok(())
}

pub(super) async fn list(context: &Context) -> Outcome {
    let vms = all_vms(context).await?;
    if context.json() {
        print_json(&vms);
        return Ok(());
    }
    let mut table = Table::new([
        Column::Text("VM"),
        Column::Text("NODE"),
        Column::Text("STATE"),
        Column::Text("IMAGE"),
        Column::Number("SIZE"),
        Column::Number("PRIVATE"),
        Column::Number("SNAPSHOTS"),
        Column::Text("DISK"),
    ]);
    for vm in vms {
        table.row([
            vm.name.to_string(),
            vm.node.to_string(),
            show_state(&vm).to_owned(),
            vm.image.to_string(),
            ByteSize(vm.size_bytes).to_string(),
            ByteSize(vm.private_bytes).to_string(),
            vm.snapshots.len().to_string(),
            vm.disk,
        ]);
    }
    table
        .print_or("No VMs. 'virtman create VM --image NAME' gives one its disk, 'virtman boot' starts many.");
    Ok(())
}

pub(super) async fn stop(context: &Context, args: &StopArgs) -> Outcome {
    let grace = if args.now { Duration::ZERO } else { args.grace };
    let body = StopVm { grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX) };
    let mut stopping = Vec::new();
    if args.all {
        for node in context.nodes().await? {
            let vms: Vec<Vm> = node.client.get("/v1/vms").await?;
            let running = vms.into_iter().filter(|vm| vm.state == VmState::Running);
            stopping.extend(running.map(|vm| (node.with_patience(grace + STOP_MARGIN), vm)));
        }
    } else {
        for name in &args.vms {
            let (node, vm) = context.find_vm(name).await?;
            stopping.push((node.with_patience(grace + STOP_MARGIN), vm));
        }
    }
    let mut tasks = tokio::task::JoinSet::new();
    for (node, vm) in stopping {
        let body = body.clone();
        tasks.spawn(async move {
            let path = format!("/v1/vms/{}/stop", vm.name);
            let answer: Result<Vm, _> = node.client.post(&path, &body).await;
            (vm, answer)
        });
    }
    let (mut stopped, mut failed) = (Vec::new(), Vec::new());
    while let Some(joined) = tasks.join_next().await {
        match joined {
            Ok((_, Ok(vm))) => {
                note(&format!("stopped '{}' on node {}", vm.name, vm.node));
                stopped.push(vm);
            }
            Ok((vm, Err(error))) => failed.push(format!("'{}' on node {}: {error}", vm.name, vm.node)),
            Err(error) => failed.push(error.to_string()),
        }
    }
    if !failed.is_empty() {
        return Err(Failure::new(failed.join("\n")));
    }
    if context.json() {
        stopped.sort_by(|a, b| (&a.name, &a.node).cmp(&(&b.name, &b.node)));
        print_json(&stopped);
    }
    Ok(())
}

/// What ending a guest may take beyond its grace.
const STOP_MARGIN: Duration = Duration::from_secs(20);

pub(super) async fn attach_console(context: &Context, name: &VmName) -> Outcome {
    let (_, vm) = context.find_vm(name).await?;
    let socket = vm.console.ok_or_else(|| {
        Failure::new(format!("'{name}' has no running guest: 'virtman boot' starts guests"))
    })?;
    if !socket.exists() {
        return Err(Failure::new(format!(
            "the console of '{name}' is a socket on the host of node {}: run this command there",
            vm.node
        )));
    }
    match console::attach(&socket).await {
        Ok(console::Detached::ByUser) => Ok(()),
        Ok(console::Detached::ByVm) => {
            note(&format!("the guest of '{name}' has ended"));
            Ok(())
        }
        Err(error) => Err(Failure::new(format!("the console of '{name}': {error}"))),
    }
}

/// The VMs of all nodes that the command is about.
pub(super) async fn all_vms(context: &Context) -> Outcome<Vec<Vm>> {
    let mut vms: Vec<Vm> = context.ask_all("/v1/vms").await?;
    vms.sort_by(|a, b| (&a.name, &a.node).cmp(&(&b.name, &b.node)));
    Ok(vms)
}

pub(super) fn show_state(vm: &Vm) -> &'static str {
    match vm.state {
        VmState::Running if vm.paused.is_some() => "paused",
        VmState::Disk => "disk",
        VmState::Running => "running",
        VmState::Stopped => "stopped",
    }
}
