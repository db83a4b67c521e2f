//! Many VM disks on one node: how long each takes, what they cost in memory, and a restart with all of them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use super::cluster::Cluster;
use super::data::{self, Filling};
use super::http::Api;
use super::process::output;
use super::report::{Bar, Better, Rounds, Row, Sample, Spread, Table};
use super::{Bench, Outcome};

/// Disks that are created.
const DISKS: usize = 500;

/// Virtual size of the image below them in bytes.
const IMAGE_BYTES: u64 = 4 << 30;

/// How long a `create` may take, in milliseconds, in 99 of 100 cases.
const CREATE_MS_MAX: f64 = 5.0;

/// Disks that one node is to create in a second.
const CREATES_PER_SECOND_MIN: f64 = 500.0;

/// Memory of the daemon, in MiB, without VMs and for each of them.
const MEMORY_MIB_MAX: f64 = 64.0;
const MEMORY_PER_VM_MIB_MAX: f64 = 1.0;

pub(super) fn run(bench: &Bench) -> Outcome<Vec<Table>> {
    bench.note("create: 500 VM disks on one node");
    let file = bench.dir.path().join("create.img");
    data::make(&file, IMAGE_BYTES, Filling::Sparse(16))?;
    let mut cluster = Cluster::start(bench)?;
    cluster.add_image("image", &file)?;
    let empty = cluster.node()?.memory()?;

    let mut api = cluster.api()?;
    let body = json!({ "image": "image:latest" });
    let mut times_ms = Vec::with_capacity(DISKS);
    let begin = Instant::now();
    for number in 0..DISKS {
        let asked = Instant::now();
        api.put(&format!("/v1/vms/vm{number}"), &body)?;
        times_ms.push(asked.elapsed().as_secs_f64() * 1e3);
    }
    let total = begin.elapsed().as_secs_f64();
    let full = cluster.node()?.memory()?;

    let durable = durable_file(bench, &mut api, &body)?;
    drop(api);
    let one_more = one_more(bench, &cluster, &file)?;
    let restarts: Outcome<Vec<f64>> =
        (0..bench.rounds).map(|_| cluster.restart_node().map(|took| took.as_secs_f64() * 1e3)).collect();
    let restarted = cluster.node()?.memory()?;
    let listed = cluster.api()?.get("/v1/vms")?.as_array().map_or(0, Vec::len);
    if listed != DISKS {
        return Err(format!("after a restart there are {listed} disks instead of {DISKS}"));
    }

    let once = |value: f64| Spread::of([value]);
    let memory_max = MEMORY_MIB_MAX + MEMORY_PER_VM_MIB_MAX * DISKS as f64;
    times_ms.sort_by(f64::total_cmp);
    let percentile = |percent: usize| once(times_ms[(times_ms.len() * percent).div_ceil(100) - 1]);
    let rows = vec![
        Row::alone("disks created, one request at a time", "1/s", once(DISKS as f64 / total))
            .with_bar(Bar::OursMin(CREATES_PER_SECOND_MIN)),
        Row::alone("create, median of all", "ms", percentile(50)),
        Row::alone("create, p99 of all", "ms", percentile(99)).with_bar(Bar::OursMax(CREATE_MS_MAX)),
        Row::alone("create, slowest of all", "ms", percentile(100)),
        durable,
        one_more,
        Row::alone("start of the daemon with all disks", "ms", Spread::of(restarts?)),
        Row::alone("resident memory without disks", "MiB", once(empty.resident_mib))
            .with_bar(Bar::OursMax(MEMORY_MIB_MAX)),
        Row::alone("resident memory with all disks", "MiB", once(full.resident_mib))
            .with_bar(Bar::OursMax(memory_max)),
        Row::alone("  of it anonymous", "MiB", once(full.anonymous_mib)),
        Row::alone(
            "  for each disk",
            "KiB",
            once((full.resident_mib - empty.resident_mib) * 1024.0 / DISKS as f64),
        ),
        Row::alone("resident memory after a restart with all disks", "MiB", once(restarted.resident_mib))
            .with_bar(Bar::OursMax(memory_max)),
    ];
    Ok(vec![Table {
        title: "500 VM disks on one node",
        notes: vec![
            "each disk is 4 GiB, is durable and listens on its NBD socket when its request is answered".to_owned(),
            "one durable file: written, synced and renamed, and its directory synced".to_owned(),
            "one more, as a command: peer is 'qemu-img create' of a qcow2 over the image, which exports nothing and syncs nothing"
                .to_owned(),
        ],
        cost_unit: "-",
        rows,
    }])
}

/// One more disk by a request, against the least that makes anything durable. It tells how much of the time
/// is the file system's.
fn durable_file(bench: &Bench, api: &mut Api, body: &Value) -> Outcome<Row> {
    let sample = |begin: Instant| Sample { value: begin.elapsed().as_secs_f64() * 1e3, cost: None };
    let ours = || {
        let begin = Instant::now();
        api.put("/v1/vms/more", body)?;
        let sample = sample(begin);
        api.delete("/v1/vms/more")?;
        Ok(sample)
    };
    let dir = bench.dir.path();
    let peer = || {
        let failed = |e: std::io::Error| format!("cannot write into {}: {e}", dir.display());
        let begin = Instant::now();
        let file = File::create(dir.join("new")).map_err(failed)?;
        file.write_all_at(&[1; 512], 0).and_then(|()| file.sync_all()).map_err(failed)?;
        fs::rename(dir.join("new"), dir.join("durable")).map_err(failed)?;
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
        Ok(sample(begin))
    };
    let rounds = Rounds::take(bench.rounds * 10, ours, peer)?;
    Ok(rounds.row("one more, as a request / one durable file of 512 bytes", "ms", Better::Less))
}

/// One more disk by the command line, against an overlay of `qemu-img`, both from process start to end.
fn one_more(bench: &Bench, cluster: &Cluster<'_>, image: &Path) -> Outcome<Row> {
    let timed = |command: &mut Command| -> Outcome<Sample> {
        let begin = Instant::now();
        output(command)?;
        Ok(Sample { value: begin.elapsed().as_secs_f64() * 1e3, cost: None })
    };
    let ours = || {
        let sample = timed(cluster.virtman().args(["create", "more", "--image", "image"]))?;
        cluster.destroy("more")?;
        Ok(sample)
    };
    let overlay = bench.dir.path().join("more.qcow2");
    let peer = || {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(image).arg(&overlay);
        let sample = timed(&mut command)?;
        fs::remove_file(&overlay).map_err(|e| format!("cannot remove {}: {e}", overlay.display()))?;
        Ok(sample)
    };
    // A command takes milliseconds: many rounds cost little and tell more.
    Ok(Rounds::take(bench.rounds * 10, ours, peer)?.row("one more, as a command", "ms", Better::Less))
}
