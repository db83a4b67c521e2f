//! `snapshot`, and `snapshot list|export|revert|delete`.

use std::path::{Path, PathBuf};

use block::{SnapshotName, VmName};
use clap::{Args, Subcommand};

use super::context::{Context, Failure, NodeClient, Outcome};
use super::details::snapshot_table;
use super::image::follow;
use super::output::{note, print_json, say};
use control::api::compute::{SnapshotTaken, SnapshotView, TakeSnapshot, Vm};
use control::api::now_unix_ms;
use control::api::qcow2::{BackingFile, ExportBacking, ExportSnapshot, SnapshotExported};
use control::units::ByteSize;

/// Take a snapshot of a VM's disk, while its guest runs or not.
///
/// The snapshot is crash-consistent: it holds every write that was answered before. The guest's writes wait for a few
/// milliseconds. With --quiesce the guest writes out its file systems first, for which it needs the QEMU guest agent.
///
/// With --to the snapshot is also written as a qcow2 file on the VM's node: what the VM wrote over its image, or with
/// --flatten the whole disk. If that fails or is interrupted, the snapshot is given up again.
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
    /// Also write it as a qcow2 file, which must not exist
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    #[command(flatten)]
    backing: BackingArgs,
}

/// What the file with a snapshot builds upon.
#[derive(Debug, Args)]
struct BackingArgs {
    /// Write the whole disk, so that the file needs no other
    #[arg(long, requires = "to", conflicts_with = "backing")]
    flatten: bool,
    /// What the file says that it builds upon, instead of the image as it can be opened on the node; not checked
    #[arg(long, requires = "to", value_name = "FILE-OR-URI")]
    backing: Option<String>,
    /// The format of that; if absent, what its name ends with, else raw
    #[arg(long, requires = "backing", value_parser = ["raw", "qcow2", "vmdk", "vhdx"])]
    backing_format: Option<String>,
}

impl BackingArgs {
    fn chosen(&self) -> ExportBacking {
        match (&self.backing, self.flatten) {
            (Some(name), _) => {
                ExportBacking::Named { name: name.clone(), format: self.backing_format.clone() }
            }
            (None, true) => ExportBacking::Nothing,
            (None, false) => ExportBacking::Image,
        }
    }
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// List a VM's snapshots, from old to new
    List {
        /// The VM
        vm: VmName,
    },
    /// Write a snapshot that was taken before as a qcow2 file on the VM's node
    Export {
        /// The VM
        vm: VmName,
        /// The snapshot
        snapshot: SnapshotName,
        /// The file, which must not exist
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
        #[command(flatten)]
        backing: BackingArgs,
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
        (None, Some(vm), Some(snapshot)) => take(context, vm, snapshot, args).await,
        _ => Err(Failure::new("say which VM, and how its snapshot is to be called")),
    }
}

async fn run_command(context: &Context, command: &SnapshotCommand) -> Outcome {
    match command {
        SnapshotCommand::List { vm } => list(context, vm).await,
        SnapshotCommand::Export { vm, snapshot, to, backing } => {
            let (node, _) = context.find_vm(vm).await?;
            export(context, &node, vm, snapshot, to, backing, None).await
        }
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

async fn take(context: &Context, vm: &VmName, snapshot: &SnapshotName, args: &SnapshotArgs) -> Outcome {
    let (node, _) = context.find_vm(vm).await?;
    let take = TakeSnapshot { quiesce: args.quiesce };
    if let Some(to) = &args.to {
        return export(context, &node, vm, snapshot, to, &args.backing, Some(take)).await;
    }
    let taken: SnapshotTaken = node.client.put(&format!("/v1/vms/{vm}/snapshots/{snapshot}"), &take).await?;
    if context.json() {
        print_json(&taken);
    } else {
        note_taken(&taken);
    }
    Ok(())
}

fn note_taken(taken: &SnapshotTaken) {
    let (vm, snapshot, waited) = (&taken.snapshot.vm, &taken.snapshot.name, taken.pause_us.div_ceil(1000));
    note(&format!("took snapshot '{snapshot}' of '{vm}'; its writes waited for {waited} ms"));
}

/// Writes a snapshot to a file, and takes it first if `take` is given.
async fn export(
    context: &Context,
    node: &NodeClient,
    vm: &VmName,
    snapshot: &SnapshotName,
    to: &Path,
    backing: &BackingArgs,
    take: Option<TakeSnapshot>,
) -> Outcome {
    let to = std::path::absolute(to)
        .map_err(|e| Failure::new(format!("cannot tell where {} would be: {e}", to.display())))?;
    let what = format!("writing {}", to.display());
    let body = ExportSnapshot { to, backing: backing.chosen(), take };
    let path = format!("/v1/vms/{vm}/snapshots/{snapshot}/export");
    let exported: SnapshotExported = follow(&node.client, &path, &body, what).await?;
    if context.json() {
        print_json(&exported);
        return Ok(());
    }
    if let Some(taken) = &exported.taken {
        note_taken(taken);
    }
    let bytes = ByteSize(exported.data_bytes);
    note(&match &exported.backing {
        Some(BackingFile { name, .. }) => format!("wrote {bytes} of data that builds upon '{name}'"),
        None => format!("wrote {bytes} of data, the whole disk"),
    });
    say(&exported.path.display().to_string());
    Ok(())
}

async fn list(context: &Context, vm: &VmName) -> Outcome {
    let (node, _) = context.find_vm(vm).await?;
    let snapshots: Vec<SnapshotView> = node.client.get(&format!("/v1/vms/{vm}/snapshots")).await?;
    if context.json() {
        print_json(&snapshots);
        return Ok(());
    }
    let table = snapshot_table(&snapshots, now_unix_ms());
    table.print_or(&format!("No snapshots. 'virtman snapshot {vm} NAME' takes one."));
    Ok(())
}
