//! The parent's end of a link: what a child wants is fetched as anybody's chunk is, and answered.

use link::wire::RequestId;
use link::{Reply, ServerEvent};

use crate::event::{End, LinkId, Side};
use crate::fetch::Got;
use crate::node::Waiter;
use crate::world::World;

impl World {
    /// Does what an event of a link's server end asks for.
    pub(crate) fn server_event(&mut self, link: LinkId, event: &ServerEvent) {
        let node = self.links[link.at()].parent_node;
        match *event {
            ServerEvent::Wanted { id, chunk, priority, .. } => {
                let Some(chunk) = self.content.find(&chunk) else {
                    return self.checks.violated("a child wants what is not a chunk of the image".to_owned());
                };
                self.links[link.at()].serving.insert(id, chunk);
                if self.fetch(node, chunk, priority, Waiter::Child(link, id)) == Got::Here {
                    self.serve_chunk(node, link, id, chunk);
                }
            }
            ServerEvent::Raised { id, priority } => {
                if let Some(&chunk) = self.links[link.at()].serving.get(&id) {
                    self.raise(node, chunk, Waiter::Child(link, id), priority);
                }
            }
            ServerEvent::Cancelled { id } => {
                if let Some(chunk) = self.links[link.at()].serving.remove(&id) {
                    self.leave(node, chunk, Waiter::Child(link, id));
                }
            }
            ServerEvent::Ready | ServerEvent::Closed(_) => {}
        }
    }

    /// Answers a child.
    pub(crate) fn answer(&mut self, link: LinkId, id: RequestId, reply: Reply) {
        let entry = &mut self.links[link.at()];
        entry.serving.remove(&id);
        if let Some(server) = entry.server.as_mut() {
            server.answer(id, reply);
            self.dirty.push_back(End { link, side: Side::Server });
        }
    }
}
