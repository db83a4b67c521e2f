//! Tests of the planner as a whole, through events and actions alone.

mod leaving;
mod model;
mod racks;
mod repair;
mod restart;
mod shape;

use std::collections::BTreeMap;

use block::{ChunkHash, ImageId, NodeName};

use crate::{
    Action, Event, Location, Millis, Peer, Placement, Planner, Role, Settings, Shape, Shaping, Standing,
    TreeNode,
};

const LEASE: Millis = Millis(10_000);

/// A planner together with what a daemon would know from its actions alone.
struct Cluster {
    planner: Planner,
    now: Millis,
    told: BTreeMap<(NodeName, ImageId), Placement>,
}

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn image(number: u8) -> ImageId {
    ImageId::from_bytes([number; 32])
}

fn address(node: &str) -> String {
    format!("{node}:7000")
}

/// A placement in one stripe, from names.
fn listed(peers: &[&str]) -> Placement {
    let peer = |node: &&str| Peer { node: name(node), address: address(node) };
    Placement { stripes: vec![peers.iter().map(peer).collect()] }
}

impl Cluster {
    fn new(fan_out: u32, stripes: u32) -> Cluster {
        let settings = Settings { lease: LEASE, shaping: Shape::new(fan_out, stripes).unwrap().into() };
        Cluster { planner: Planner::new(settings), now: Millis(0), told: BTreeMap::new() }
    }

    /// One that no longer learns, with an origin `o` and relays `n001`, `n002`, … of image 1.
    fn grown(fan_out: u32, stripes: u32, relays: usize) -> Cluster {
        let mut cluster = Cluster::new(fan_out, stripes);
        cluster.apply(Event::Tick);
        cluster.pass(LEASE);
        cluster.join("o", Role::Origin);
        for number in 1..=relays {
            cluster.join(&relay(number), Role::Relay);
        }
        cluster
    }

    fn apply_unchecked(&mut self, event: Event) -> Vec<Action> {
        if let Event::Attach { node, image, current, .. } = &event {
            // The node's own word replaces what it was told.
            self.told.remove(&(node.clone(), *image));
            self.told.extend(current.clone().map(|current| ((node.clone(), *image), current)));
        }
        let actions = self.planner.apply(self.now, event);
        for action in &actions {
            match action {
                Action::Place { node, image, placement } => {
                    let former = self.told.insert((node.clone(), *image), placement.clone());
                    assert_ne!(former.as_ref(), Some(placement), "{node} is told what it knows");
                }
                Action::Dead { node } => self.told.retain(|(told, _), _| told != node),
                _ => {}
            }
        }
        actions
    }

    fn apply(&mut self, event: Event) -> Vec<Action> {
        let actions = self.apply_unchecked(event);
        self.planner.check();
        actions
    }

    /// Lets time pass in which every node is heard of.
    fn pass(&mut self, time: Millis) -> Vec<Action> {
        self.now = self.now + time;
        let nodes: Vec<NodeName> = self.planner.nodes().map(|view| view.node).collect();
        let mut actions = Vec::new();
        for node in nodes {
            actions.extend(self.apply_unchecked(Event::Heartbeat { node }));
        }
        actions.extend(self.apply(Event::Tick));
        actions
    }

    fn up(&mut self, node: &str, location: &str) {
        let location: Location = location.parse().unwrap();
        self.apply_unchecked(Event::NodeUp { node: name(node), address: address(node), location });
    }

    fn attach(&mut self, node: &str, role: Role, current: Option<Placement>) -> Vec<Action> {
        self.apply_unchecked(Event::Attach { node: name(node), image: image(1), role, current })
    }

    fn join(&mut self, node: &str, role: Role) -> Vec<Action> {
        self.up(node, "");
        self.attach(node, role, None)
    }

    fn down(&mut self, node: &str) -> Vec<Action> {
        self.apply(Event::NodeDown { node: name(node) })
    }

    fn lost(&mut self, by: &str, parent: &str) -> Vec<Action> {
        self.apply(Event::Lost { by: name(by), parent: name(parent) })
    }

    fn blame(&mut self, by: &str, liar: &str) -> Vec<Action> {
        let chunk = ChunkHash::of(b"any");
        self.apply(Event::Blame { by: name(by), liar: name(liar), image: image(1), chunk })
    }

    fn stripe(&self, stripe: usize) -> Vec<TreeNode> {
        self.planner.tree(&image(1)).map(|tree| tree.stripes[stripe].clone()).unwrap_or_default()
    }

    /// `child<parent` for each node of the first stripe, by name of the child.
    fn drawn(&self) -> Vec<String> {
        let parent = |node: &TreeNode| node.parent.as_ref().map_or("-".to_owned(), ToString::to_string);
        let mut drawn: Vec<String> =
            self.stripe(0).iter().map(|node| format!("{}<{}", node.node, parent(node))).collect();
        drawn.sort();
        drawn
    }

    fn parent(&self, node: &str) -> Option<String> {
        let node = name(node);
        let found = self.stripe(0).into_iter().find(|entry| entry.node == node);
        found.expect("the node is in the tree").parent.map(|parent| parent.to_string())
    }

    /// Whom the node was told to ask in the first stripe.
    fn peers(&self, node: &str) -> Vec<String> {
        let told = &self.told[&(name(node), image(1))];
        told.stripes[0].iter().map(|peer| peer.node.to_string()).collect()
    }

    fn depth(&self) -> u32 {
        let tree = self.planner.tree(&image(1)).unwrap();
        tree.stripes.iter().flatten().map(|node| node.depth).max().unwrap()
    }

    fn standing(&self, node: &str) -> Standing {
        self.planner.node(&name(node)).unwrap().standing
    }
}

fn relay(number: usize) -> String {
    format!("n{number:03}")
}

/// Whom the actions place anew.
fn placed(actions: &[Action]) -> Vec<String> {
    let node = |action: &Action| match action {
        Action::Place { node, .. } => Some(node.to_string()),
        _ => None,
    };
    actions.iter().filter_map(node).collect()
}
