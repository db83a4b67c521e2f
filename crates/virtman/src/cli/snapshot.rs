//! `snapshot`, and `snapshot list|revert|delete`.

use block::{SnapshotName, VmName};
use clap::{Args, Subcommand};

use super::context::{Context, Failure, Outcome};
use super::output::{Column, Table, note, print_json};
use super::profile::age;
use crate::api::compute::{SnapshotTaken, SnapshotView, TakeSnapshot, Vm};
use crate::api::now_unix_ms;
use crate::units::ByteSize;

/// Take a snapshot of a VM's disk, while its guest runs or not.
///
/// The snapshot is what a power cut at that moment would leave on the disk; the guest's writes wait for a few
/// milliseconds. With --quiesce it writes out its file systems first, for which it needs the QEMU guest agent.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    command: Option<SnapshotCommand>,
    /// The VM
    #[arg(required = true)]
    vm: Option<VmName>,
    /// The snapshot's name, unique for its VM
    #[arg(required = true)]
    snapshot: Option<SnapshotName>,
    /// Have the guest's agent freeze its file systems meanwhile
    #[arg(long)]
    quiesce: bool,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// List a VM's snapshots, from old to new
    List {
        /// The VM
        vm: VmName,
    },
    /// Set a VM's disk back to a snapshot; what was written since is lost
    ///
    /// The guest must not run. Whoever has the disk open otherwise is disconnected. The snapshot stays.
    Revert {
        /// The VM
        vm: VmName,
        /// The snapshot
        snapshot: SnapshotName,
    },
    /// Give a snapshot up; the disk and the other snapshots stay as they are
    Delete {
        /// The VM
        vm: VmName,
        /// The snapshots
        #[arg(required = true)]
        snapshots: Vec<SnapshotName>,
    },
}

pub(super) async fn run(context: &Context, args: &SnapshotArgs) -> Outcome {
    match (&args.command, &args.vm, &args.snapshot) {
        (Some(command), ..) => run_command(context, command).await,
        (None, Some(vm), Some(snapshot)) => take(context, vm, snapshot, args.quiesce).await,
        _ => Err(Failure::new("say which VM, and how its snapshot is to be called")),
    }
}

async fn run_command(context: &Context, command: &SnapshotCommand) -> Outcome {
    match command {
        SnapshotCommand::List { vm } => list(context, vm).await,
        SnapshotCommand::Revert { vm, snapshot } => {
            let (node, _) = context.find_vm(vm).await?;
            let path = format!("/v1/vms/{vm}/snapshots/{snapshot}/revert");
            let vm: Vm = node.client.post(&path, &()).await?;
            if context.json() {
                print_json(&vm);
            } else {
                note(&format!("set the disk of '{}' back to '{snapshot}'", vm.name));
            }
            Ok(())
        }
        SnapshotCommand::Delete { vm, snapshots } => {
            let (node, _) = context.find_vm(vm).await?;
            for snapshot in snapshots {
                node.client.delete::<()>(&format!("/v1/vms/{vm}/snapshots/{snapshot}")).await?;
                context.done("deleted", snapshot, &format!("deleted snapshot '{snapshot}' of '{vm}'"));
            }
            Ok(())
        }
    }
}

async fn take(context: &Context, vm: &VmName, snapshot: &SnapshotName, quiesce: bool) -> Outcome {
    let (node, _) = context.find_vm(vm).await?;
    let path = format!("/v1/vms/{vm}/snapshots/{snapshot}");
    let taken: SnapshotTaken = node.client.put(&path, &TakeSnapshot { quiesce }).await?;
    if context.json() {
        print_json(&taken);
    } else {
        let waited = taken.pause_us.div_ceil(1000);
        note(&format!("took snapshot '{snapshot}' of '{vm}'; its writes waited for {waited} ms"));
    }
    Ok(())
}

async fn list(context: &Context, vm: &VmName) -> Outcome {
    let (node, _) = context.find_vm(vm).await?;
    let snapshots: Vec<SnapshotView> = node.client.get(&format!("/v1/vms/{vm}/snapshots")).await?;
    if context.json() {
        print_json(&snapshots);
        return Ok(());
    }
    let mut table = Table::new([
        Column::Text("SNAPSHOT"),
        Column::Text("TAKEN"),
        Column::Text("QUIESCED"),
        Column::Number("WRITTEN BEFORE"),
    ]);
    let now = now_unix_ms();
    for snapshot in snapshots {
        table.row([
            snapshot.name.to_string(),
            format!("{} ago", age(now.saturating_sub(snapshot.created_unix_ms))),
            if snapshot.quiesced { "yes" } else { "no" }.to_owned(),
            ByteSize(snapshot.private_bytes).to_string(),
        ]);
    }
    table.print_or(&format!("No snapshots. 'virtman snapshot {vm} NAME' takes one."));
    Ok(())
}
