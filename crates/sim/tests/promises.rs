//! A handful of seeds, and proof that the checkers can fail.

use sim::{Bug, Faults, Scenario, Shape, Shaping, run};

/// The scenario of a seed that failed once, or of any other: more are tried by `sim search`.
const SEEDS: [u64; 10] = [1, 4, 8, 11, 13, 15, 37, 40, 45, 100_001];

/// Thirty nodes on a good day, with a bug.
fn with_bug(bug: Bug) -> Scenario {
    let mut scenario = Scenario::random(7);
    (scenario.nodes, scenario.racks, scenario.guests, scenario.profile) = (30, 0, 1, true);
    (scenario.faults, scenario.shaping) = (Faults::None, Shaping::Fixed(Shape::BINARY));
    scenario.bug = Some(bug);
    scenario
}

fn found(bug: Bug) -> String {
    run(&with_bug(bug)).expect_err("the bug is found").what
}

#[test]
fn some_seeds_with_all_kinds_of_faults_keep_all_promises() {
    for seed in SEEDS {
        if let Err(failure) = run(&Scenario::random(seed)) {
            panic!("{failure}\nrepeat it with: cargo run -p sim -- --seed {seed}");
        }
    }
}

#[test]
fn a_run_is_a_function_of_its_seed() {
    let once = || run(&Scenario::random(8)).unwrap();
    let (a, b) = (once(), once());
    assert_eq!((a.events, a.healed, a.origin_bytes), (b.events, b.healed, b.origin_bytes));
    assert_eq!(a.complete, b.complete);
}

#[test]
fn without_faults_each_chunk_is_sent_to_each_node_once() {
    let mut scenario = Scenario::random(3);
    (scenario.guests, scenario.faults, scenario.profile) = (0, Faults::None, true);
    assert_eq!(run(&scenario).unwrap().sent_per_kept, 1.0);
}

#[test]
fn a_planner_that_gives_too_many_children_is_found() {
    let what = found(Bug::CrowdedParents);
    assert!(what.contains("children, more than 2"), "{what}");
}

#[test]
fn a_relay_that_passes_wrong_chunks_on_is_found() {
    let what = found(Bug::WrongChunks);
    assert!(what.contains("sent a wrong chunk"), "{what}");
}

#[test]
fn a_node_that_keeps_what_it_did_not_verify_is_found() {
    let what = found(Bug::Credulous);
    assert!(what.contains("keeps wrong bytes"), "{what}");
}

#[test]
fn a_guest_that_waits_for_ever_is_found() {
    let what = found(Bug::ForgottenGuest);
    assert!(what.contains("still waits"), "{what}");
}
