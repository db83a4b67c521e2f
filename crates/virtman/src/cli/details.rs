//! `show`.

use block::VmName;

use super::context::{Context, Outcome};
use super::output::{Column, Table, print, print_json, say};
use super::profile::age;
use super::vm::show_state;
use control::api::compute::{SnapshotView, Vm};
use control::api::details::{BootTimeline, LayerState, LayerView, VmDetails};
use control::api::now_unix_ms;
use control::units::ByteSize;

pub(super) async fn show(context: &Context, name: &VmName) -> Outcome {
    let (node, _) = context.find_vm(name).await?;
    let details: VmDetails = node.client.get(&format!("/v1/vms/{name}/details")).await?;
    if context.json() {
        print_json(&details);
        return Ok(());
    }
    let now = now_unix_ms();
    for (key, value) in facts(&details, now) {
        say(&format!("{key:<9}  {value}"));
    }
    say("");
    print(&layer_table(&details.layers, now).render());
    if !details.snapshots.is_empty() {
        say("");
        print(&snapshot_table(&details.snapshots, now).render());
    }
    Ok(())
}

/// What there is to say of a VM in a line each.
fn facts(details: &VmDetails, now: u64) -> Vec<(&'static str, String)> {
    let VmDetails { vm, io, cache, .. } = details;
    let mut facts = vec![("name", vm.name.to_string()), ("node", vm.node.to_string()), ("state", state(vm))];
    if let Some(paused) = &vm.paused {
        facts.push(("paused", format!("since {}: {}", ago(now, paused.since_unix_ms), paused.reason)));
    }
    facts.extend([
        ("created", ago(now, vm.created_unix_ms)),
        ("image", format!("{} ({})", vm.image, vm.image_id.short())),
        ("parents", parents(details)),
        ("disk", format!("{} ({} bytes), serial {}", ByteSize(vm.size_bytes), vm.size_bytes, details.serial)),
    ]);
    for disk in details.disks.iter().skip(1) {
        let (size, image) = (ByteSize(disk.size_bytes), &disk.image);
        let shown =
            format!("{size} ({} bytes) on {image}, serial {}, {}", disk.size_bytes, disk.id, disk.nbd);
        facts.push(("disk", shown));
    }
    facts.extend([
        ("own", ByteSize(details.own_bytes).to_string()),
        ("shared", format!("{} with other VMs or images", ByteSize(details.shared_bytes))),
    ]);
    if let Some(carried) = &details.taking_over {
        let names: Vec<String> = carried.names.iter().map(ToString::to_string).collect();
        facts.push((
            "incoming",
            format!("still takes over another VM's disk, by way of {}", names.join(", ")),
        ));
    }
    for export in &details.exports {
        for (portal, address) in export.addresses.iter().enumerate() {
            let sessions = export.sessions.iter().filter(|session| session.portal == portal);
            let sessions = match export.target {
                Some(_) => format!(", {} sessions", sessions.count()),
                None => String::new(),
            };
            facts.push(("export", format!("{address}{sessions}")));
        }
    }
    let (read, written) = (ByteSize(io.read_bytes), ByteSize(io.written_bytes));
    facts.push(("reads", format!("{}, {read}", io.reads)));
    facts.push((
        "writes",
        format!("{}, {written}; {} flushes, {} zeroed or discarded", io.writes, io.flushes, io.clears),
    ));
    facts.push((
        "cache",
        format!("{} hits, {} misses, of all VMs on node {}", cache.hits, cache.misses, vm.node),
    ));
    facts.push(("boot", boot(&details.boot, now)));
    facts
}

fn state(vm: &Vm) -> String {
    match vm.pid {
        Some(pid) => format!("{}, pid {pid}", show_state(vm)),
        None => show_state(vm).to_owned(),
    }
}

fn ago(now: u64, then: u64) -> String {
    format!("{} ago", age(now.saturating_sub(then)))
}

/// Whom the image is fetched from, stripe by stripe.
fn parents(details: &VmDetails) -> String {
    if details.image.role == "origin" {
        return "none: this node is an origin of the image".to_owned();
    }
    let stripe = |nodes: &Vec<block::NodeName>| {
        let names: Vec<&str> = nodes.iter().map(block::NodeName::as_str).collect();
        names.join(", ")
    };
    let mut stripes: Vec<String> = details.image.parents.iter().map(stripe).collect();
    stripes.dedup();
    stripes.join(" | ")
}

/// How far the last boot came, in the order in which it happens.
fn boot(boot: &BootTimeline, now: u64) -> String {
    let mut steps: Vec<String> = boot.disk_ms.map(|ms| format!("disk after {ms} ms")).into_iter().collect();
    steps.extend(boot.started_unix_ms.map(|at| format!("guest started {}", ago(now, at))));
    steps.extend(boot.first_read_ms.map(|ms| format!("first read {ms} ms later")));
    steps.extend(boot.ready_ms.map(|ms| format!("ready {ms} ms after its start")));
    if steps.is_empty() {
        return "-".to_owned();
    }
    steps.join(", ")
}

fn layer_table(layers: &[LayerView], now: u64) -> Table {
    let mut table = Table::new([
        Column::Text("LAYER"),
        Column::Number("BYTES"),
        Column::Text("MADE"),
        Column::Text("STATE"),
        Column::Text("SHARED"),
        Column::Text("SNAPSHOTS"),
    ]);
    for layer in layers {
        let snapshots: Vec<&str> = layer.snapshots.iter().map(block::SnapshotName::as_str).collect();
        let state = match layer.state {
            LayerState::Writable => "writable",
            LayerState::Frozen => "frozen",
        };
        table.row([
            layer.id.clone(),
            ByteSize(layer.bytes).to_string(),
            ago(now, layer.made_unix_ms),
            state.to_owned(),
            if layer.shared { "yes" } else { "no" }.to_owned(),
            snapshots.join(", "),
        ]);
    }
    table
}

/// Snapshots, from old to new.
pub(super) fn snapshot_table(snapshots: &[SnapshotView], now: u64) -> Table {
    let mut table = Table::new([
        Column::Text("SNAPSHOT"),
        Column::Text("TAKEN"),
        Column::Text("QUIESCED"),
        Column::Number("WRITTEN BEFORE"),
    ]);
    for snapshot in snapshots {
        table.row([
            snapshot.name.to_string(),
            ago(now, snapshot.created_unix_ms),
            if snapshot.quiesced { "yes" } else { "no" }.to_owned(),
            ByteSize(snapshot.private_bytes).to_string(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_is_told_as_far_as_it_came() {
        assert_eq!(boot(&BootTimeline::default(), 0), "-");
        let mut timeline = BootTimeline { disk_ms: Some(4), ..BootTimeline::default() };
        assert_eq!(boot(&timeline, 0), "disk after 4 ms");
        timeline.started_unix_ms = Some(1_000);
        timeline.first_read_ms = Some(90);
        timeline.ready_ms = Some(9000);
        assert_eq!(
            boot(&timeline, 61_000),
            "disk after 4 ms, guest started 1 min ago, first read 90 ms later, ready 9000 ms after its start"
        );
    }
}
