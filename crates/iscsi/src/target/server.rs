//! The shell: listeners, connections, deadlines and pings.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rand::Rng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::buffers::Input;
use super::memory_budget::Budget;
use super::registry::{AddError, Doors, Registry, SessionKey};
use super::session::{Peer, Session, Stage};
use super::session_status::{ActiveSession, SessionStatus};
use super::{Admission, Portal, Target};
use crate::limits::{
    ACCEPT_PAUSE, CONNECTIONS_MAX, DRAIN_TIME_MAX, LOGIN_SEGMENT_BYTES_MAX, LOGIN_TIME_MAX, PING_AFTER,
    PING_TIME_MAX, SEGMENT_BYTES_MAX,
};
use crate::login::{Agreed, Challenge, Login, Step};
use crate::name::IscsiName;
use crate::pdu::{
    Digests, FrameError, HEADER_BYTES, LoginRequest, LoginResponse, event, frame, login_status, seal,
};
use crate::scsi::{InitiatorPort, Nexus, TargetPort};

/// What a server is told at its beginning.
#[derive(Debug, Clone, Default)]
pub struct ServerOptions {
    /// The addresses at which it can be reached, for discovery and for the ports that units report. The
    /// groups of the listeners have to be among them.
    pub portals: Vec<Portal>,
    /// Who may ask for the list of targets; everybody sees only the targets that know its name.
    pub discovery: Admission,
}

/// Serves targets to whoever connects.
#[derive(Clone)]
pub struct Server {
    registry: Arc<Registry>,
    budget: Arc<Budget>,
    options: Arc<ServerOptions>,
    connections: Arc<tokio::sync::Semaphore>,
}

/// Why a connection ended otherwise than by the initiator's wish or ours. In every case only this connection
/// is concerned.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// What came is no PDU that may come.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Something else than a login came first.
    #[error("the initiator began with operation code {0:#04x} instead of a login")]
    NoLogin(u8),
    /// The login was refused.
    #[error("a login of {initiator} was refused with status {status:#06x}")]
    Refused {
        /// What the initiator calls itself.
        initiator: String,
        /// The [`login_status`] that it was told.
        status: u16,
    },
    /// The login took longer than [`LOGIN_TIME_MAX`].
    #[error("the initiator did not log in within {LOGIN_TIME_MAX:?}")]
    TooSlow,
    /// The initiator did not answer a ping.
    #[error("the initiator was silent for {:?}", PING_AFTER + PING_TIME_MAX)]
    Silent,
    /// The initiator did not take its last replies.
    #[error("the connection could not be closed in order: replies were left")]
    NotDrained,
    /// An operation on a disk panicked, so that its command cannot be answered.
    #[error("an operation on the disk failed: {0}")]
    Disk(tokio::task::JoinError),
}

impl Server {
    /// A server without targets.
    pub fn new(options: ServerOptions) -> Server {
        Server {
            registry: Arc::new(Registry::new(options.portals.clone())),
            budget: Arc::default(),
            options: Arc::new(options),
            connections: Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX)),
        }
    }

    /// Serves a further target.
    pub fn add(&self, target: Target) -> Result<(), AddError> {
        self.registry.add(target)
    }

    /// Serves a target no longer: its sessions are told, and have ended when this answers. Whether there was
    /// one of this name.
    pub async fn remove(&self, name: &IscsiName) -> bool {
        self.registry.remove(name).await
    }

    /// The sessions with a target, the oldest first; none if there is no such target.
    pub fn sessions(&self, target: &IscsiName) -> Vec<SessionStatus> {
        self.registry.statuses(target)
    }

    /// Serves whoever connects to `listener`, as portal group `group`. Dropping the future closes all
    /// connections that came through it.
    pub async fn serve(&self, listener: TcpListener, group: u16) -> io::Result<()> {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => {
                        let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() else {
                            tracing::warn!(%peer, "initiator_refused: {CONNECTIONS_MAX} are connected");
                            continue;
                        };
                        let server = self.clone();
                        connections.spawn(async move {
                            if let Err(error) = server.serve_connection(stream, group).await {
                                tracing::info!(%peer, %error, "iscsi_connection_ended");
                            }
                            drop(permit);
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "connection_not_accepted: iSCSI");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
            }
        }
    }

    /// Serves one connection until it ends.
    pub async fn serve_connection(&self, mut stream: TcpStream, group: u16) -> Result<(), ServeError> {
        stream.set_nodelay(true)?;
        let ends = Ends { local: stream.local_addr()?, peer: stream.peer_addr()?, group };
        let mut input = Input::new();
        let login = self.log_in(&mut stream, &mut input, ends);
        let session = tokio::time::timeout(LOGIN_TIME_MAX, login).await;
        match session.map_err(|_| ServeError::TooSlow)?? {
            Some(session) => run(stream, input, session).await,
            None => Ok(()),
        }
    }

    /// The login phase; `None` if the initiator went away in it.
    async fn log_in(
        &self,
        stream: &mut TcpStream,
        input: &mut Input,
        ends: Ends,
    ) -> Result<Option<Session>, ServeError> {
        let (challenge, tsih) = {
            let mut random = rand::rng();
            (Challenge { id: random.random(), bytes: random.random() }, random.random_range(1..=u16::MAX))
        };
        let mut login = Login::new(challenge, ends.group, tsih);
        let doors = Doors { registry: &self.registry, discovery: &self.options.discovery };
        loop {
            let max = LOGIN_SEGMENT_BYTES_MAX as usize;
            let Some(request) = frame(input.filled(), Digests::default(), max)? else {
                match stream.read(input.room()).await? {
                    0 => return Ok(None),
                    len => input.fill(len),
                }
                continue;
            };
            if request.header.opcode() != LoginRequest::OPCODE {
                return Err(ServeError::NoLogin(request.header.opcode()));
            }
            let pdu = LoginRequest::parse(&request.header);
            let (mut response, text, step) = login.feed(&pdu, request.data, &doors);
            let used = request.bytes;
            input.consume(used);
            match step {
                Step::Continue => respond(stream, &response, &text).await?,
                Step::Refused(status) => {
                    respond(stream, &response, &text).await?;
                    return Err(ServeError::Refused { initiator: login.initiator(), status });
                }
                Step::Done(agreed) => match self.begin(agreed, ends).await {
                    Some(session) => {
                        respond(stream, &response, &text).await?;
                        return Ok(Some(session));
                    }
                    None => {
                        let status = login_status::REMOVED;
                        (response.status, response.flags) = (status, 0);
                        respond(stream, &response, &[]).await?;
                        return Err(ServeError::Refused { initiator: login.initiator(), status });
                    }
                },
            }
        }
    }

    /// Makes a session of a login; `None` if its target was removed meanwhile.
    async fn begin(&self, agreed: Agreed, ends: Ends) -> Option<Session> {
        let Some(target) = agreed.target.clone() else {
            return Some(self.session(agreed, Peer::Discovery, ends));
        };
        let mut groups: Vec<u16> = self.options.portals.iter().map(|portal| portal.group).collect();
        groups.push(ends.group);
        groups.sort_unstable();
        groups.dedup();
        let initiator = InitiatorPort { name: agreed.initiator.to_string(), isid: agreed.isid };
        let port = TargetPort { name: target.to_string(), group: ends.group, groups };
        let (name, isid) = (agreed.initiator.clone(), agreed.isid);
        let key = SessionKey { initiator: name, isid, target, group: ends.group };
        let membership = self.registry.join(key, ends.peer, agreed.authentication).await?;
        let nexus = Nexus { id: membership.nexus, initiator, target: Arc::new(port) };
        membership.attach(&nexus);
        tracing::info!(initiator = %agreed.initiator, target = %nexus.target.name, "initiator_logged_in");
        Some(self.session(agreed, Peer::Target(membership, nexus), ends))
    }

    fn session(&self, agreed: Agreed, peer: Peer, ends: Ends) -> Session {
        let (registry, budget) = (Arc::clone(&self.registry), Arc::clone(&self.budget));
        Session::new(agreed, peer, registry, budget, ends.local, ends.group)
    }
}

/// Where a connection begins and ends.
#[derive(Debug, Clone, Copy)]
struct Ends {
    /// Our address, as the initiator reached us.
    local: SocketAddr,
    /// The initiator's.
    peer: SocketAddr,
    /// The portal group.
    group: u16,
}

async fn respond(stream: &mut TcpStream, response: &LoginResponse, text: &[u8]) -> io::Result<()> {
    let seal = seal(response.header(), text, Digests::default());
    stream.write_all(&[seal.head(), text, seal.tail()].concat()).await
}

/// The full feature phase of a connection.
async fn run(stream: TcpStream, input: Input, mut session: Session) -> Result<(), ServeError> {
    let ended = drive(stream, input, &mut session).await;
    // Whoever waits for the end of this session counts on it that nothing of it reaches a disk any more.
    session.jobs.shutdown().await;
    ended
}

async fn drive(stream: TcpStream, mut input: Input, session: &mut Session) -> Result<(), ServeError> {
    let (mut reader, mut writer) = stream.into_split();
    let active = session.active.clone();
    let mut heard = Instant::now();
    let mut pinged = false;
    let mut closes_at: Option<Instant> = None;
    loop {
        while let Some(ended) = session.jobs.try_join_next_with_id() {
            session.ended(ended).map_err(ServeError::Disk)?;
        }
        take_all(session, &mut input)?;
        match session.stage {
            Stage::Open => {}
            Stage::Closed => return Ok(()),
            Stage::Closing if session.output.bytes() == 0 => return Ok(writer.shutdown().await?),
            Stage::Closing => closes_at = closes_at.or(Some(Instant::now() + DRAIN_TIME_MAX)),
        }
        let silent_at = heard + if pinged { PING_AFTER + PING_TIME_MAX } else { PING_AFTER };
        let slices = session.output.slices();
        let (sends, takes) = (!slices.is_empty(), session.takes_input());
        tokio::select! {
            biased;
            () = mail_for(active.as_deref()) => {
                if let Some(active) = &active {
                    session.take_mail(active.mailbox.take());
                }
            }
            Some(ended) = session.jobs.join_next_with_id(), if !session.jobs.is_empty() => {
                session.ended(ended).map_err(ServeError::Disk)?;
            }
            sent = writer.write_vectored(&slices), if sends => {
                match sent? {
                    0 => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                    len => session.output.sent(len),
                }
                session.tidy();
                session.pump();
            }
            read = reader.read(input.room()), if takes => {
                match read? {
                    0 => return Ok(()),
                    len => input.fill(len),
                }
                (heard, pinged) = (Instant::now(), false);
            }
            () = tokio::time::sleep_until(closes_at.unwrap_or(silent_at)) => {
                if closes_at.is_some() {
                    return Err(ServeError::NotDrained);
                }
                if pinged {
                    session.part(event::SESSION_DROPPED);
                    return Err(ServeError::Silent);
                }
                pinged = true;
                session.ping();
            }
        }
    }
}

async fn mail_for(active: Option<&ActiveSession>) {
    match active {
        Some(active) => active.mailbox.arrived.notified().await,
        None => std::future::pending().await,
    }
}

/// Deals with every PDU that has come, as far as the initiator takes the replies.
fn take_all(session: &mut Session, input: &mut Input) -> Result<(), FrameError> {
    while session.takes_input() && input.filled().len() >= HEADER_BYTES {
        let (digests, max) = (session.parameters.digests, SEGMENT_BYTES_MAX as usize);
        let Some(pdu) = frame(input.filled(), digests, max)? else { break };
        session.take(&pdu);
        session.tidy();
        let used = pdu.bytes;
        input.consume(used);
    }
    Ok(())
}
