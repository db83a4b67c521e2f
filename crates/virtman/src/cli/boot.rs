//! `virtman boot`: many VMs from one image, spread over the nodes, until each is ready.
//!
//! Every step of every VM runs on its own; the first VM that is ready does not wait for the last disk.
//! Repeating the command finds what is there: disks are kept, and guests that run are only waited for.

use std::collections::BTreeSet;
use std::fs;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use block::{ImageName, NodeName, VmName};
use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::task::JoinSet;

use super::context::{Context, Failure, NodeClient, Outcome, find_node};
use super::output::{Column, Table, note, print_json, say};
use control::api::compute::{
    CreateVm, KernelBoot, NodeStatus, OnFull, StartVm, Vm, VmReady, VmStarted, WaitReady,
};
use control::api::volt::{ImageRecord, NodeRecord, NodeState};
use control::units::{ByteSize, show_ms};

/// VMs of one command. A bound against a slip of the finger, far above what a cluster runs.
pub(super) const COUNT_MAX: u32 = 100_000;

/// How often the progress lines are renewed.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// What an answer may take beyond the wait that was asked for.
const WAIT_MARGIN: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub(crate) struct BootArgs {
    /// The image
    #[arg(long)]
    image: ImageName,
    /// How many VMs
    #[arg(long, short = 'n', default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(COUNT_MAX)))]
    count: u32,
    /// Only on these nodes; all that are up if absent
    #[arg(long, value_delimiter = ',', value_name = "NODE,...")]
    nodes: Vec<NodeName>,
    /// VMs are named NAME-1, NAME-2 and so on; the image's name if absent
    #[arg(long)]
    name: Option<VmName>,
    /// Memory of each guest
    #[arg(long, default_value = "512M")]
    memory: ByteSize,
    /// Virtual processors of each guest
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    cpus: u32,
    /// When a guest counts as ready: `console:REGEX`, `agent` (QEMU guest agent) or `tcp:PORT`
    #[arg(long, default_value = "console:login:", value_name = "WHAT")]
    ready: String,
    /// How long a guest may take to be ready
    #[arg(long, default_value = "10m", value_parser = control::units::parse_duration)]
    timeout: Duration,
    /// cloud-init user data for every guest
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,
    /// A public key file for the guests' default user (repeatable)
    #[arg(long, value_name = "FILE")]
    ssh_key: Vec<PathBuf>,
    /// Boot this kernel instead of the disk's boot loader; a path on the nodes
    #[arg(long, value_name = "FILE", requires = "append")]
    kernel: Option<PathBuf>,
    /// Its initial ramdisk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Its command line, such as `root=/dev/vda1 ro console=ttyS0`
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    append: Option<String>,
    /// When there is no room for what a guest writes: pause it until there is, or report an error to it
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    on_full: OnFull,
}

/// What `boot` did, as JSON.
#[derive(Serialize)]
struct Report {
    vms: Vec<VmLine>,
    nodes: Vec<NodeLine>,
    /// Bytes that left the image's origins on their links during the command.
    origin_sent_bytes: u64,
}

#[derive(Serialize)]
struct VmLine {
    vm: VmName,
    node: NodeName,
    disk_ms: Option<u64>,
    first_read_ms: Option<u64>,
    ready_ms: Option<u64>,
    error: Option<String>,
}

#[derive(Serialize)]
struct NodeLine {
    node: NodeName,
    vms: usize,
    fetched_bytes: u64,
    fetched_chunks: u64,
    sent_bytes: u64,
}

/// One node with what happens on it.
struct Place {
    name: NodeName,
    node: NodeClient,
    patient: NodeClient,
    before: NodeStatus,
    total: usize,
    ready: AtomicUsize,
    failed: AtomicUsize,
}

/// What every VM of the command gets.
pub(super) struct Plan {
    pub(super) create: CreateVm,
    pub(super) start: StartVm,
    pub(super) wait: WaitReady,
}

pub(super) async fn run(context: &Context, args: &BootArgs) -> Outcome {
    let plan = Arc::new(plan(args)?);
    let image: ImageRecord = context.volt()?.get(&format!("/v1/images/{}", args.image)).await?;
    let cluster = context.cluster().await?;
    let only = if args.nodes.is_empty() { context.named_node() } else { args.nodes.as_slice() };
    let chosen: Vec<&NodeRecord> = match only {
        [] => cluster.nodes.iter().filter(|node| node.state == NodeState::Up).collect(),
        names => names.iter().map(|name| find_node(&cluster, name)).collect::<Outcome<_>>()?,
    };
    if chosen.is_empty() {
        return Err(Failure::new("no node is up: start 'virtman compute' on some host first"));
    }
    let names = vm_names(args)?;
    boot_all(context, &image, &cluster.nodes, &chosen, names, plan).await
}

/// Boots VMs of these names, spread over the chosen nodes, and shows what came of it.
pub(super) async fn boot_all(
    context: &Context,
    image: &ImageRecord,
    nodes: &[NodeRecord],
    chosen: &[&NodeRecord],
    names: Vec<VmName>,
    plan: Arc<Plan>,
) -> Outcome {
    let patience = Duration::from_millis(plan.wait.timeout_ms) + WAIT_MARGIN;
    let mut places = Vec::new();
    for (index, record) in chosen.iter().enumerate() {
        let total = names.iter().skip(index).step_by(chosen.len()).count();
        if total > 0 {
            places.push(place(context, record, total, patience).await?);
        }
    }
    let origins = origins(context, image, nodes).await;

    let progress = Arc::new(progress(&places));
    let mut tasks = JoinSet::new();
    for (index, name) in names.into_iter().enumerate() {
        let (place, plan) = (Arc::clone(&places[index % places.len()]), Arc::clone(&plan));
        let progress = Arc::clone(&progress);
        tasks.spawn(async move { boot_one(name, &place, &plan, &progress).await });
    }
    let mut vms = Vec::new();
    while let Some(joined) = tasks.join_next().await {
        vms.push(joined.map_err(|e| Failure::new(format!("a boot was interrupted: {e}")))?);
    }
    progress.finish();
    vms.sort_by_key(|line| natural(&line.vm));

    let mut nodes = Vec::new();
    for place in &places {
        nodes.push(node_line(place).await);
    }
    let mut origin_sent_bytes = 0;
    for (node, before) in origins {
        let after = sent_bytes(&node).await.unwrap_or(before);
        origin_sent_bytes += after.saturating_sub(before);
    }
    let report = Report { vms, nodes, origin_sent_bytes };
    if context.json() {
        print_json(&report);
    } else {
        show(&report);
    }
    match report.vms.iter().filter(|vm| vm.error.is_some()).count() {
        0 => Ok(()),
        failed => Err(Failure::new(format!("{failed} of {} VMs did not become ready", report.vms.len()))),
    }
}

fn plan(args: &BootArgs) -> Outcome<Plan> {
    let read = |path: &PathBuf| {
        fs::read_to_string(path).map_err(|e| Failure::new(format!("cannot read {}: {e}", path.display())))
    };
    let memory_mib = u32::try_from(args.memory.0 >> 20).unwrap_or(u32::MAX);
    if memory_mib == 0 {
        return Err(Failure::new(format!("--memory {} is less than 1M", args.memory)));
    }
    let mut forward_ports = Vec::new();
    if let Some(port) = args.ready.strip_prefix("tcp:") {
        forward_ports.push(port.parse().map_err(|_| {
            Failure::new(format!("--ready {}: '{port}' is not a TCP port: use 1 to 65535", args.ready))
        })?);
    }
    let ssh_keys = args.ssh_key.iter().map(read).collect::<Outcome<Vec<_>>>()?;
    let ssh_keys = ssh_keys.iter().flat_map(|text| text.lines()).map(str::trim).filter(|l| !l.is_empty());
    let start = StartVm {
        memory_mib,
        cpus: args.cpus,
        user_data: args.user_data.as_ref().map(read).transpose()?,
        ssh_keys: ssh_keys.map(str::to_owned).collect(),
        kernel: args.kernel.as_ref().map(|kernel| KernelBoot {
            kernel: kernel.clone(),
            initrd: args.initrd.clone(),
            append: args.append.clone().unwrap_or_default(),
        }),
        forward_ports,
        on_full: args.on_full,
    };
    let timeout_ms = u64::try_from(args.timeout.as_millis()).unwrap_or(u64::MAX);
    Ok(Plan {
        create: CreateVm {
            image: args.image.clone(),
            size_bytes: None,
            further_disks: Vec::new(),
            iscsi: None,
            settle_on: None,
        },
        start,
        wait: WaitReady { ready: args.ready.clone(), timeout_ms },
    })
}

fn vm_names(args: &BootArgs) -> Outcome<Vec<VmName>> {
    let image = args.image.as_str();
    let prefix = match &args.name {
        Some(name) => name.as_str(),
        None => image.split_once(':').map_or(image, |(name, _)| name),
    };
    numbered(prefix, args.count)
}

/// `prefix-1`, `prefix-2` and so on.
pub(super) fn numbered(prefix: &str, count: u32) -> Outcome<Vec<VmName>> {
    let name = |number: u32| {
        format!("{prefix}-{number}")
            .parse()
            .map_err(|e| Failure::new(format!("{e}; choose a shorter --name")))
    };
    (1..=count).map(name).collect()
}

/// Sorts `vm-2` before `vm-10`.
pub(super) fn natural(name: &VmName) -> (String, u64) {
    let text = name.as_str();
    let digits = text.len() - text.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let (prefix, number) = text.split_at(text.len() - digits);
    (prefix.to_owned(), number.parse().unwrap_or(0))
}

async fn place(
    context: &Context,
    record: &NodeRecord,
    total: usize,
    patience: Duration,
) -> Outcome<Arc<Place>> {
    let node = context.remote(record)?;
    let before: NodeStatus = node.client.get("/v1/status").await.map_err(|e| {
        Failure::new(format!("node {} does not answer: {e}; leave it out with --nodes", record.node))
    })?;
    let patient = node.with_patience(patience);
    let (ready, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    Ok(Arc::new(Place { name: record.node.clone(), node, patient, before, total, ready, failed }))
}

/// The image's origins that answer, with what they have sent so far.
async fn origins(context: &Context, image: &ImageRecord, nodes: &[NodeRecord]) -> Vec<(NodeClient, u64)> {
    let mut origins = Vec::new();
    for record in nodes.iter().filter(|node| image.origins.contains(&node.node)) {
        if let Ok(node) = context.remote(record)
            && let Some(sent) = sent_bytes(&node).await
        {
            origins.push((node, sent));
        }
    }
    origins
}

async fn sent_bytes(node: &NodeClient) -> Option<u64> {
    node.client.get::<NodeStatus>("/v1/status").await.ok().map(|status| status.links.sent_wire_bytes)
}

async fn boot_one(vm: VmName, place: &Place, plan: &Plan, progress: &Progress) -> VmLine {
    let node = place.name.clone();
    let mut line = VmLine { vm, node, disk_ms: None, first_read_ms: None, ready_ms: None, error: None };
    let steps = async {
        let path = format!("/v1/vms/{}", line.vm);
        let disk: Vm = place.patient.client.put(&path, &plan.create).await?;
        line.disk_ms = disk.disk_ms;
        let started: VmStarted = place.patient.client.post(&format!("{path}/start"), &plan.start).await?;
        progress.say_once(format!("Guests run with {}.", started.accelerator));
        let ready: VmReady = place.patient.client.post(&format!("{path}/wait"), &plan.wait).await?;
        line.first_read_ms = ready.first_read_ms;
        line.ready_ms = Some(ready.ready_ms);
        Ok::<_, control::http::ClientError>(())
    };
    match steps.await {
        Ok(()) => {
            place.ready.fetch_add(1, Ordering::Relaxed);
        }
        Err(error) => {
            place.failed.fetch_add(1, Ordering::Relaxed);
            line.error = Some(error.to_string());
        }
    }
    line
}

async fn node_line(place: &Place) -> NodeLine {
    let after = place.node.client.get::<NodeStatus>("/v1/status").await;
    let after = after.unwrap_or_else(|_| place.before.clone());
    let (links, before) = (after.links, place.before.links);
    NodeLine {
        node: place.name.clone(),
        vms: place.total,
        fetched_bytes: links.received_wire_bytes.saturating_sub(before.received_wire_bytes),
        fetched_chunks: links.received_chunks.saturating_sub(before.received_chunks),
        sent_bytes: links.sent_wire_bytes.saturating_sub(before.sent_wire_bytes),
    }
}

fn show(report: &Report) {
    let mut vms = Table::new([
        Column::Text("VM"),
        Column::Text("NODE"),
        Column::Number("DISK"),
        Column::Number("FIRST READ"),
        Column::Number("READY"),
        Column::Text("ERROR"),
    ]);
    let ms = |ms: Option<u64>| ms.map_or_else(|| "-".to_owned(), show_ms);
    for vm in &report.vms {
        vms.row([
            vm.vm.to_string(),
            vm.node.to_string(),
            ms(vm.disk_ms),
            ms(vm.first_read_ms),
            ms(vm.ready_ms),
            vm.error.clone().unwrap_or_default(),
        ]);
    }
    vms.print_or("");
    say("");
    let mut nodes = Table::new([
        Column::Text("NODE"),
        Column::Number("VMS"),
        Column::Number("FETCHED"),
        Column::Number("CHUNKS"),
        Column::Number("SENT"),
    ]);
    for node in &report.nodes {
        nodes.row([
            node.node.to_string(),
            node.vms.to_string(),
            ByteSize(node.fetched_bytes).to_string(),
            node.fetched_chunks.to_string(),
            ByteSize(node.sent_bytes).to_string(),
        ]);
    }
    nodes.print_or("");
    say("");
    say(&format!("The origin sent {}.", ByteSize(report.origin_sent_bytes)));
}

/// The live lines, one a node; without a terminal there are none.
struct Progress {
    bars: MultiProgress,
    updater: Option<tokio::task::JoinHandle<()>>,
    said: Mutex<BTreeSet<String>>,
}

fn progress(places: &[Arc<Place>]) -> Progress {
    let bars = MultiProgress::new();
    if !std::io::stderr().is_terminal() {
        return Progress { bars, updater: None, said: Mutex::default() };
    }
    let width = places.iter().map(|place| place.name.as_str().len()).max().unwrap_or(0);
    let template = format!("{{prefix:{width}}} [{{bar:24}}] {{pos}}/{{len}} ready{{msg}} {{elapsed}}");
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let style = style.progress_chars("=> ");
    let lines: Vec<(Arc<Place>, ProgressBar)> = places
        .iter()
        .map(|place| {
            let bar = bars.add(ProgressBar::new(place.total as u64).with_style(style.clone()));
            bar.set_prefix(place.name.to_string());
            bar.enable_steady_tick(PROGRESS_EVERY);
            (Arc::clone(place), bar)
        })
        .collect();
    let updater = tokio::spawn(async move {
        loop {
            for (place, bar) in &lines {
                let fetched = match place.node.client.get::<NodeStatus>("/v1/status").await {
                    Ok(now) => {
                        now.links.received_wire_bytes.saturating_sub(place.before.links.received_wire_bytes)
                    }
                    Err(_) => continue,
                };
                let failed = match place.failed.load(Ordering::Relaxed) {
                    0 => String::new(),
                    failed => format!(", {failed} failed"),
                };
                bar.set_position(place.ready.load(Ordering::Relaxed) as u64);
                bar.set_message(format!("{failed}, fetched {}", ByteSize(fetched)));
            }
            tokio::time::sleep(PROGRESS_EVERY).await;
        }
    });
    Progress { bars, updater: Some(updater), said: Mutex::default() }
}

impl Progress {
    /// Says something that many VMs have to say, above the live lines.
    fn say_once(&self, line: String) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.contains(&line) {
            return;
        }
        if self.updater.is_some() {
            // Nothing is lost if the line cannot be drawn: the terminal has gone.
            let _ = self.bars.println(&line);
        } else {
            note(&line);
        }
        said.insert(line);
    }

    fn finish(&self) {
        if let Some(updater) = &self.updater {
            updater.abort();
            // As above.
            let _ = self.bars.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vms_sort_by_their_numbers() {
        let mut names: Vec<VmName> = ["a-10", "a-2", "a-1"].iter().map(|n| n.parse().unwrap()).collect();
        names.sort_by_key(natural);
        assert_eq!(names.iter().map(VmName::as_str).collect::<Vec<_>>(), ["a-1", "a-2", "a-10"]);
    }
}
