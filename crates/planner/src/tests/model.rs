//! Random events: after each, every invariant holds, and the actions alone say what the planner says.

use proptest::prelude::*;

use super::*;

const NODES: u8 = 14;
const IMAGES: u8 = 2;

fn node() -> impl Strategy<Value = NodeName> {
    (0..NODES).prop_map(|number| name(&format!("n{number}")))
}

fn images() -> impl Strategy<Value = ImageId> {
    (0..IMAGES).prop_map(image)
}

fn role() -> impl Strategy<Value = Role> {
    prop_oneof![1 => Just(Role::Origin), 6 => Just(Role::Relay)]
}

fn current() -> impl Strategy<Value = Option<Placement>> {
    let peer = node().prop_map(|node| Peer { address: address(node.as_str()), node });
    let stripe = prop::collection::vec(peer, 0..3);
    prop::option::weighted(0.4, prop::collection::vec(stripe, 1..3).prop_map(|stripes| Placement { stripes }))
}

fn event() -> impl Strategy<Value = Event> {
    let location = prop::sample::select(vec!["", "z1", "z1/r1", "z1/r2", "z2/r1"]);
    let up = (node(), location).prop_map(|(node, location)| Event::NodeUp {
        address: address(node.as_str()),
        node,
        location: location.parse().unwrap(),
    });
    let attach = (node(), images(), role(), current())
        .prop_map(|(node, image, role, current)| Event::Attach { node, image, role, current });
    let shape = prop::sample::select(vec![(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (4, 3), (4, 4)]);
    let fixed = shape.prop_map(|(fan_out, stripes)| Some(Shape::new(fan_out, stripes).unwrap().into()));
    let shaping = prop_oneof![6 => fixed, 2 => Just(Some(Shaping::Auto)), 1 => Just(None)];
    prop_oneof![
        8 => up,
        3 => node().prop_map(|node| Event::Heartbeat { node }),
        2 => node().prop_map(|node| Event::NodeDown { node }),
        16 => attach,
        2 => (node(), images()).prop_map(|(node, image)| Event::Detach { node, image }),
        3 => (node(), images()).prop_map(|(node, image)| Event::Leave { node, image }),
        6 => (node(), node()).prop_map(|(by, parent)| Event::Lost { by, parent }),
        4 => (node(), node(), images()).prop_map(|(by, liar, image)| {
            Event::Blame { by, liar, image, chunk: ChunkHash::ZERO }
        }),
        1 => node().prop_map(|node| Event::Quarantine { node }),
        2 => node().prop_map(|node| Event::Pardon { node }),
        1 => (images(), shaping).prop_map(|(image, shaping)| Event::Tune { image, shaping }),
        4 => Just(Event::Tick),
    ]
}

fn story() -> impl Strategy<Value = Vec<(u64, Event)>> {
    let step = prop_oneof![6 => 0..50u64, 1 => 0..4_000u64];
    prop::collection::vec((step, event()), 1..150)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_invariants_hold_and_the_actions_say_it_all(story in story(), shape in 1..3u32) {
        let mut cluster = Cluster::new(2, shape);
        let mut again = Cluster::new(2, shape);
        for (step, event) in story {
            cluster.now = cluster.now + Millis(step);
            again.now = cluster.now;
            let actions = cluster.apply(event.clone());
            prop_assert_eq!(&actions, &again.apply_unchecked(event), "the same events, the same actions");
            for node in cluster.planner.nodes() {
                for image in node.images {
                    let told = cluster.told.get(&(node.node.clone(), image));
                    prop_assert_eq!(cluster.planner.placement(&node.node, &image), told);
                }
            }
        }
        cluster.pass(LEASE);
        cluster.pass(LEASE);
    }
}
