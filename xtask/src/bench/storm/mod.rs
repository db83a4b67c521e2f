//! The storm: many nodes on links of a given speed boot many VMs from one image at once.
//!
//! Everything real but the guests and the wires: a Volt, an origin and nodes as released, each in a network
//! namespace of its own ([`network`], [`site`]); VMs are replays of a recorded boot ([`trace`], [`replay`])
//! against the disks that their nodes export. All of it lives in namespaces of the command's own ([`cage`]), so
//! that nothing is left behind, whatever happens.
//!
//! What is compared: a *cold* run, with empty caches, against a *warm* one of new VMs on the same nodes; the
//! time until all nodes have what a boot reads against the time that one link needs for it; and VirtMan
//! against foreign programs in the same network under the same guests.

mod attach;
mod baseline;
mod cage;
mod churn;
mod content;
mod crowd;
mod figures;
mod histogram;
mod network;
mod ours;
mod plan;
mod plot;
mod replay;
mod report;
mod site;
mod trace;
mod watch;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use self::crowd::Cast;
use self::ours::{Caches, Task, Weather};
pub(crate) use self::plan::StormArgs;
use self::plan::{Boot, Plan, Profile, Shape};
use self::replay::{Script, Writes};
use self::report::Report;
use self::site::Site;
use super::Outcome;
use super::process::Virtman;

/// The image's name in the cluster.
const IMAGE: &str = "storm:latest";

/// Runs what `args` say, in namespaces of its own.
pub(crate) fn run(args: &StormArgs) -> Outcome {
    if !cage::is_inside() {
        args.check()?;
        let status = cage::run_inside()?;
        return if status.success() { Ok(()) } else { Err(failure(status)) };
    }
    // Opened before the place where they may lie is covered.
    let create =
        |path: &PathBuf| File::create(path).map_err(|e| format!("cannot write {}: {e}", path.display()));
    let json = args.json.as_ref().map(create).transpose()?;
    let svg = args.svg.as_ref().map(create).transpose()?;
    let virtman = Virtman::given_or_built(args.program.as_deref(), "storm")?;
    let files = cage::settle()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|e| format!("cannot start the runtime: {e}"))?;
    let report = runtime.block_on(measure(args, &virtman, &files))?;
    report.print();
    if let Some(file) = json {
        report.write_json(file)?;
    }
    if let Some(file) = svg {
        plot::write(file, &report)?;
    }
    report.verdict()
}

fn failure(status: ExitStatus) -> String {
    format!("the storm ended with {status}; it says above why")
}

/// All runs, one after the other.
async fn measure(args: &StormArgs, virtman: &Virtman, files: &Path) -> Outcome<Report> {
    let trace = args.trace()?;
    let boot = Boot::of(&trace);
    let image = files.join("image");
    let wanted: BTreeSet<u64> = boot.chunks.iter().copied().collect();
    note("making the image");
    content::write_image(&image, args.seed, trace.disk_bytes, &wanted, args.image_bytes())?;
    let mut report = Report::new(args, &trace, &boot);
    let script = |writes| Script { trace: trace.clone(), think: args.think, seed: args.seed, writes };
    let cast = |prefix, writes| Cast {
        script: Arc::new(script(writes)),
        vms_per_seat: args.vms,
        prefix,
        limit: Duration::from_secs(args.limit),
    };
    for shape in &args.shapes {
        let plan = args.plan(*shape);
        note(&format!("{shape}: starting Volt, the origin and {} nodes", plan.nodes));
        let dir = files.join("site");
        let site = Arc::new(Site::start(virtman, &dir, &plan, &image)?);
        if plan.profile == Profile::Trace {
            let profile = files.join("profile");
            boot.write_profile(&profile, site.image_id()?)?;
            site.import_profile(&profile)?;
        }
        let weather = args.churn.map_or(Weather::Calm, |kind| Weather::Churn { kind, seed: args.seed });
        let name = if args.vms == 0 { "attach" } else { "cold" };
        let task = |name: &str, prefix, caches, weather| Task {
            name: format!("{name} {shape}"),
            plan: &plan,
            boot: &boot,
            cast: cast(prefix, Writes::ToDisk),
            caches,
            weather,
        };
        note(&format!("{shape}: {name}"));
        let mut cold = ours::run(&task(name, "c", Caches::Cold, weather), &site).await?;
        if args.vms > 0 && args.churn.is_none() {
            note(&format!("{shape}: warm"));
            let warm = ours::run(&task("warm", "w", Caches::Warm, Weather::Calm), &site).await?;
            cold.cold_to_warm = Some(cold.makespan_seconds / warm.makespan_seconds);
            report.runs.extend([cold, warm]);
        } else {
            report.runs.push(cold);
        }
        drop(site);
        fs::remove_dir_all(&dir).map_err(|e| format!("cannot remove {}: {e}", dir.display()))?;
    }
    if args.baselines {
        for kind in baseline::ALL {
            note(&format!("baseline: {kind}"));
            let plan = args.plan(Shape::Auto);
            report
                .runs
                .push(baseline::run(kind, &plan, &boot, &cast("b", Writes::Kept), files, &image).await?);
        }
    }
    if args.attach {
        note("attach at depth 7");
        report.attach = Some(attach::measure(virtman, files, &args.plan(Shape::CHAIN), &image, &boot).await?);
    }
    Ok(report)
}

/// Tells whoever waits at the terminal what goes on; tables are for standard output.
fn note(what: &str) {
    eprintln!("storm: {what}");
}
