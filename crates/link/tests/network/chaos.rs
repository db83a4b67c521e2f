//! Random failures, from a seed.

use std::sync::Arc;
use std::time::Duration;

use block::{ChunkSource, Priority};
use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use tokio::time::sleep;

use crate::harness::{Listener, Memory, Mood, Net, Node, chunk};

const PARENTS: [&str; 4] = ["a", "b", "c", "origin"];

/// One random event: a parent dies, comes back, changes its mood, freezes; or the plan changes.
fn shake(rng: &mut StdRng, net: &Net, memories: &[Arc<Memory>], node: &Node) {
    let at = rng.random_range(0..PARENTS.len());
    match rng.random_range(0..6) {
        0 => net.kill(PARENTS[at]),
        1 => drop(net.listen(PARENTS[at], memories[at].clone())),
        2 => {
            net.kill(PARENTS[at]);
            net.set(PARENTS[at], Listener::Frozen);
        }
        3 => {
            let mut plan = PARENTS[..rng.random_range(0..PARENTS.len())].to_vec();
            plan.shuffle(rng);
            plan.push("origin");
            node.plan(&plan);
        }
        _ => {
            // The origin does not lie: a chunk that only liars hold would be waited for until the ban is over.
            let moods = [Mood::Gives, Mood::Hangs, Mood::Denies, Mood::Lies];
            let moods = if PARENTS[at] == "origin" { &moods[..2] } else { &moods[..] };
            memories[at].mood.send_replace(*moods.choose(rng).unwrap());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_happens_to_parents_every_read_gets_its_right_bytes() {
    for seed in 0..20 {
        let mut rng = StdRng::seed_from_u64(seed);
        let net = Arc::new(Net::default());
        let memories: Vec<Arc<Memory>> = PARENTS.iter().map(|_| Memory::new(Mood::Gives)).collect();
        for (parent, memory) in PARENTS.iter().zip(&memories) {
            net.listen(parent, memory.clone());
        }
        let node = Node::new(&net, "child", &PARENTS);
        let mut fetches = Vec::new();
        for n in 0..300 {
            shake(&mut rng, &net, &memories, &node);
            fetches.push((n % 100, node.start(n % 100)));
            if rng.random_ratio(1, 5) {
                // The reader goes away.
                let at = rng.random_range(0..fetches.len());
                fetches.swap_remove(at).1.abort();
            }
            sleep(Duration::from_millis(rng.random_range(0..200))).await;
        }
        net.kill("origin");
        net.listen("origin", memories[3].clone());
        memories[3].mood.send_replace(Mood::Gives);
        node.plan(&["origin"]);
        let (numbers, fetches): (Vec<u32>, Vec<_>) = fetches.into_iter().unzip();
        for (n, fetched) in numbers.into_iter().zip(join_all(fetches).await) {
            assert_eq!(fetched.unwrap().unwrap(), chunk(n), "seed {seed}");
        }
        let background = node.fetcher.fetch(chunk(0).hash(), Priority::Background).await;
        assert_eq!(background.unwrap(), chunk(0), "seed {seed}: the node is as good as new");
    }
}
