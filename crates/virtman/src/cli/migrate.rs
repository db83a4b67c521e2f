//! `migrate`.

use block::{NodeName, VmName};
use clap::Args;

use super::context::{Context, Failure, Outcome, find_node};
use super::image::follow;
use super::output::{note, print_json};
use control::api::compute::{ExpectVm, MigrateVm, Migrated};
use control::units::{ByteSize, show_ms};

/// Move a VM to another node, while its guest runs or not.
///
/// A running guest goes on where it was, after a pause of some hundred milliseconds: its memory is sent while it runs,
/// and so is what it writes. What it wrote before is there at once and follows in the background; until it has, the
/// VM needs the node that it came from. Its snapshots move with it. Whatever fails, the VM runs on one of the two nodes.
#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// The VM
    vm: VmName,
    /// The node
    #[arg(long, value_name = "NODE")]
    to: NodeName,
}

pub(super) async fn run(context: &Context, args: &MigrateArgs) -> Outcome {
    let (source, vm) = context.find_vm(&args.vm).await?;
    let cluster = context.cluster().await?;
    let to = find_node(&cluster, &args.to)?;
    let from = find_node(&cluster, &vm.node)?;
    if to.node == vm.node {
        return Err(Failure::new(format!("'{}' is on node {} already", vm.name, vm.node)));
    }
    // The target takes VMs only from where an administrator says.
    let expect = ExpectVm { from: vm.node.clone(), address: from.address.clone() };
    context.remote(to)?.client.put::<()>(&format!("/v1/incoming/{}", vm.name), &expect).await?;
    let body = MigrateVm { to: to.node.clone(), address: to.address.clone() };
    let path = format!("/v1/vms/{}/migrate", vm.name);
    let moved: Migrated = follow(&source.client, &path, &body, format!("moving {}", vm.name)).await?;
    if context.json() {
        print_json(&moved);
    } else {
        let took = show_ms(moved.total_ms);
        note(&format!("moved '{}' from node {} to {} in {took}", vm.name, vm.node, to.node));
        if moved.memory_bytes > 0 {
            note(&format!(
                "its guest stood still for {} ms; {} of memory and {} of its disk were sent",
                moved.pause_ms,
                ByteSize(moved.memory_bytes),
                ByteSize(moved.disk_bytes),
            ));
        }
    }
    Ok(())
}
