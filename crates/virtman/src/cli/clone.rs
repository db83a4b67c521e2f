//! `clone` and `commit`.

use std::sync::Arc;
use std::time::Duration;

use block::{ImageName, NodeName, VmName};
use clap::Args;
use tokio::task::JoinSet;

use super::boot::{self, Plan};
use super::context::{Context, Failure, NodeClient, Outcome, find_node};
use super::image::follow;
use super::output::{note, print_json, say};
use control::api::compute::{CloneVm, CommitVm, CreateVm, NodeImage, StartVm, Vm, WaitReady};
use control::api::volt::ImageRecord;

/// Make copies of a VM's disk as it is now, on its node or on others.
///
/// The VM runs on; its writes wait for a few milliseconds. A clone can be used at once, wherever it is: it shares what
/// the VM's disk was made of, and only what the VM wrote itself moves to other nodes, from node to node like an image,
/// when a clone reads it and in the background.
#[derive(Debug, Args)]
pub(crate) struct CloneArgs {
    /// The VM
    vm: VmName,
    /// On these nodes, in turn; on the VM's own if absent
    #[arg(long, value_delimiter = ',', value_name = "NODE,...")]
    to: Vec<NodeName>,
    /// The clone's name; of several clones, NAME-1, NAME-2 and so on. VM-clone if absent
    #[arg(long)]
    name: Option<VmName>,
    /// How many clones
    #[arg(long, short = 'n', default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(boot::COUNT_MAX)))]
    count: u32,
    /// Have the guest's agent freeze its file systems meanwhile
    #[arg(long)]
    quiesce: bool,
    /// Also start a guest on each clone, as the VM's own was started last, and wait until it is ready
    #[arg(long)]
    start: bool,
    /// When a guest counts as ready: `console:REGEX`, `agent` (QEMU guest agent) or `tcp:PORT`
    #[arg(long, default_value = "console:login:", value_name = "WHAT", requires = "start")]
    ready: String,
    /// How long a guest may take to be ready
    #[arg(long, default_value = "10m", value_parser = control::units::parse_duration, requires = "start")]
    timeout: Duration,
}

/// Make an image of a VM's disk as it is now.
///
/// The VM runs on. Its node becomes the image's origin; only what the VM wrote itself is read and hashed, and nothing is
/// copied.
#[derive(Debug, Args)]
pub(crate) struct CommitArgs {
    /// The VM
    vm: VmName,
    /// The image's name with tag
    #[arg(long = "as", value_name = "IMAGE")]
    image: ImageName,
    /// Have the guest's agent freeze its file systems meanwhile
    #[arg(long)]
    quiesce: bool,
}

pub(super) async fn commit(context: &Context, args: &CommitArgs) -> Outcome {
    let (node, vm) = context.find_vm(&args.vm).await?;
    let body = CommitVm { image: args.image.clone(), quiesce: args.quiesce, passing: false };
    let image = commit_on(&node, &vm.name, &body).await?;
    if context.json() {
        print_json(&image);
    } else {
        say(&format!("{} {}", args.image, image.id));
    }
    Ok(())
}

async fn commit_on(node: &NodeClient, vm: &VmName, body: &CommitVm) -> Outcome<NodeImage> {
    follow(&node.client, &format!("/v1/vms/{vm}/commit"), body, format!("hashing what {vm} wrote")).await
}

pub(super) async fn clone(context: &Context, args: &CloneArgs) -> Outcome {
    let (source, vm) = context.find_vm(&args.vm).await?;
    let prefix = args.name.clone().map_or_else(|| format!("{}-clone", vm.name), |name| name.to_string());
    let names = match args.count {
        1 => vec![prefix.parse().map_err(|e| Failure::new(format!("{e}; choose another --name")))?],
        count => boot::numbered(&prefix, count)?,
    };
    if args.to.iter().all(|node| *node == vm.node) && !args.start {
        let body = CloneVm { clones: names, quiesce: args.quiesce };
        let clones: Vec<Vm> = source.client.post(&format!("/v1/vms/{}/clones", vm.name), &body).await?;
        show(context, &clones);
        return Ok(());
    }
    let cluster = context.cluster().await?;
    let to = if args.to.is_empty() { std::slice::from_ref(&vm.node) } else { args.to.as_slice() };
    let chosen = to.iter().map(|name| find_node(&cluster, name)).collect::<Outcome<Vec<_>>>()?;
    let start: Option<StartVm> = match args.start {
        true => Some(source.client.get(&format!("/v1/vms/{}/start", vm.name)).await?),
        false => None,
    };
    // A name that nobody else would choose, and that goes with the last node that needs it.
    let image: ImageName = format!("clone:{:016x}", rand::random::<u64>())
        .parse()
        .map_err(|e| Failure::new(format!("cannot name what is cloned: {e}")))?;
    let body = CommitVm { image: image.clone(), quiesce: args.quiesce, passing: true };
    let carried = commit_on(&source, &vm.name, &body).await?;
    // A disk that is still as its image needs no other to carry it. One that was carried here itself a moment ago, and
    // not changed since, goes on as it came.
    let is_changed = carried.id != vm.image_id;
    let came_as = match (is_changed, carried.names.contains(&image)) {
        (false, _) => vm.image.clone(),
        (true, true) => image,
        // The name that it came by may be gone from the catalog meanwhile.
        (true, false) => {
            context.volt()?.get::<ImageRecord>(&format!("/v1/images/{}", carried.id)).await?.name
        }
    };
    let create = CreateVm {
        image: came_as,
        size_bytes: Some(vm.size_bytes),
        further_disks: Vec::new(),
        iscsi: None,
        settle_on: is_changed.then(|| vm.image.clone()),
    };
    match start {
        Some(start) => {
            let timeout_ms = u64::try_from(args.timeout.as_millis()).unwrap_or(u64::MAX);
            let wait = WaitReady { ready: args.ready.clone(), timeout_ms };
            let record: ImageRecord = context.volt()?.get(&format!("/v1/images/{}", create.image)).await?;
            let plan = Arc::new(Plan { create, start, wait });
            boot::boot_all(context, &record, &cluster.nodes, &chosen, names, plan).await
        }
        None => {
            let mut nodes = Vec::new();
            for record in chosen {
                nodes.push(Arc::new(context.remote(record)?));
            }
            create_all(context, &nodes, names, create).await
        }
    }
}

/// Creates these VMs on the nodes in turn, all at once.
async fn create_all(
    context: &Context,
    nodes: &[Arc<NodeClient>],
    names: Vec<VmName>,
    create: CreateVm,
) -> Outcome {
    let create = Arc::new(create);
    let mut tasks = JoinSet::new();
    for (index, name) in names.into_iter().enumerate() {
        let (node, create) = (Arc::clone(&nodes[index % nodes.len()]), Arc::clone(&create));
        tasks.spawn(async move {
            let created = node.client.put::<Vm>(&format!("/v1/vms/{name}"), &*create).await;
            created.map_err(|error| format!("'{name}': {error}"))
        });
    }
    let (mut clones, mut failed) = (Vec::new(), Vec::new());
    while let Some(joined) = tasks.join_next().await {
        match joined.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(vm) => clones.push(vm),
            Err(error) => failed.push(error),
        }
    }
    clones.sort_by_key(|vm| boot::natural(&vm.name));
    show(context, &clones);
    if failed.is_empty() { Ok(()) } else { Err(Failure::new(failed.join("\n"))) }
}

fn show(context: &Context, clones: &[Vm]) {
    if context.json() {
        print_json(&clones);
        return;
    }
    for vm in clones {
        note(&format!("cloned to '{}' on node {}", vm.name, vm.node));
        say(&vm.disk);
    }
}
