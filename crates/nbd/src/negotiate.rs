//! The server's side of the negotiation: a state machine without a socket.
//!
//! Bytes go in, replies and [`Event`]s come out; one call deals with at most one message, so that a caller
//! can send what it answered before it reads on. Nothing is allocated by a length that was not checked.
//!
//! Invariants:
//! - With [`Tls::Required`] nothing but `STARTTLS` and `ABORT` is answered before TLS is up.
//! - `STARTTLS` forgets everything that was agreed before it.

use crate::export::{Export, Exports};
use crate::limits::{OPTION_BYTES_MAX, OPTIONS_MAX, REQUEST_BYTES_MAX, STRING_BYTES_MAX};
use crate::proto::{
    BASE_ALLOCATION, EXPORT_NAME_PADDING, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Fields, Framing, INIT_MAGIC,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, info, option, rep,
};

/// The context id that stands for `base:allocation` in every session.
pub const ALLOCATION_CONTEXT: u32 = 1;

/// How the negotiation stands towards TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// Not offered.
    Off,
    /// Nothing goes on until the client has asked for it.
    Required,
    /// It is up.
    Up,
}

/// Whether the client may ask for the status of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contexts {
    /// None were selected.
    None,
    /// `base:allocation` was selected.
    Allocation,
}

/// What was agreed, once the negotiation is over.
pub struct Session {
    /// What the client chose.
    pub export: Export,
    /// How requests and replies are framed.
    pub framing: Framing,
    /// The metadata contexts in use.
    pub contexts: Contexts,
}

/// What a call of [`Negotiation::feed`] led to.
pub enum Event {
    /// The message is not complete: come back with more bytes.
    Incomplete,
    /// A message was dealt with.
    Continue,
    /// Send what was answered, then begin the TLS handshake.
    StartTls,
    /// Send what was answered, then close: the client wants no more.
    Abort,
    /// Send what was answered; requests follow.
    Transmission(Session),
}

/// The client cannot be served; send what was answered and close.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NegotiationError {
    /// The client set flags that were not offered.
    #[error("the client set unknown flags {0:#x}")]
    Flags(u32),
    /// The bytes are no option.
    #[error("expected an option, got magic {0:#018x}")]
    Magic(u64),
    /// The data of an option is longer than [`OPTION_BYTES_MAX`].
    #[error("the client sent {0} bytes with one option, more than {OPTION_BYTES_MAX}")]
    OptionTooLong(u32),
    /// The client sent more than [`OPTIONS_MAX`] options.
    #[error("the client sent more than {OPTIONS_MAX} options")]
    TooManyOptions,
    /// The old way to choose an export cannot be answered with an error.
    #[error("the client asked for an export in a way that can only be refused by hanging up: {0}")]
    ExportName(&'static str),
}

/// One negotiation.
pub struct Negotiation {
    client_flags: Option<u32>,
    tls: Tls,
    framing: Framing,
    /// The export that metadata contexts were selected for.
    context_export: Option<String>,
    options: u32,
}

/// The data of `INFO`, `GO` and `EXPORT_NAME`.
struct Choice<'a> {
    name: &'a str,
    wants: Vec<u16>,
}

impl Negotiation {
    /// A negotiation that has sent nothing yet.
    pub fn new(tls: Tls) -> Negotiation {
        let framing = Framing::Simple;
        Negotiation { client_flags: None, tls, framing, context_export: None, options: 0 }
    }

    /// What the server sends first.
    pub fn greeting() -> [u8; 18] {
        let mut out = [0; 18];
        out[..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
        out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        out[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        out
    }

    /// Deals with the message at the front of `input`, appends the answer to `out`, and says how many
    /// bytes the message had (0 with [`Event::Incomplete`]).
    pub fn feed(
        &mut self,
        input: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Event), NegotiationError> {
        let mut fields = Fields(input);
        if self.client_flags.is_none() {
            let Some(flags) = fields.u32() else { return Ok((0, Event::Incomplete)) };
            if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
                return Err(NegotiationError::Flags(flags));
            }
            self.client_flags = Some(flags);
            return Ok((4, Event::Continue));
        }
        let Some(magic) = fields.u64() else { return Ok((0, Event::Incomplete)) };
        if magic != OPTION_MAGIC {
            return Err(NegotiationError::Magic(magic));
        }
        let (Some(option), Some(len)) = (fields.u32(), fields.u32()) else {
            return Ok((0, Event::Incomplete));
        };
        if len as usize > OPTION_BYTES_MAX {
            refuse(out, option, rep::ERR_TOO_BIG, "the data of this option is too long");
            return Err(NegotiationError::OptionTooLong(len));
        }
        let Some(data) = fields.bytes(len as usize) else { return Ok((0, Event::Incomplete)) };
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Err(NegotiationError::TooManyOptions);
        }
        Ok((input.len() - fields.0.len(), self.answer(option, data, exports, out)?))
    }

    /// TLS is up: nothing that was agreed before counts.
    pub fn tls_is_up(&mut self) {
        self.tls = Tls::Up;
        self.framing = Framing::Simple;
        self.context_export = None;
    }

    fn answer(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<Event, NegotiationError> {
        if self.tls == Tls::Required && !matches!(option, option::STARTTLS | option::ABORT) {
            if option == option::EXPORT_NAME {
                return Err(NegotiationError::ExportName("TLS is required"));
            }
            refuse(out, option, rep::ERR_TLS_REQD, "use TLS");
            return Ok(Event::Continue);
        }
        match option {
            option::EXPORT_NAME => return self.export_name(data, exports, out),
            option::ABORT => {
                reply(out, option, rep::ACK, &[]);
                return Ok(Event::Abort);
            }
            option::INFO | option::GO => return Ok(self.info_or_go(option, data, exports, out)),
            option::LIST_META_CONTEXT => self.meta_contexts(option, data, exports, out),
            option::SET_META_CONTEXT => {
                self.context_export = None;
                self.meta_contexts(option, data, exports, out);
            }
            option::LIST | option::STARTTLS | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => {
                if data.is_empty() {
                    return Ok(self.plain(option, exports, out));
                }
                refuse(out, option, rep::ERR_INVALID, "this option has no data");
            }
            _ => refuse(out, option, rep::ERR_UNSUP, "this option is not known"),
        }
        Ok(Event::Continue)
    }

    /// The options that have no data.
    fn plain(&mut self, option: u32, exports: &dyn Exports, out: &mut Vec<u8>) -> Event {
        match (option, self.tls, self.framing) {
            (option::LIST, ..) => list(exports, out),
            (option::STARTTLS, Tls::Required, _) => {
                reply(out, option, rep::ACK, &[]);
                return Event::StartTls;
            }
            (option::STARTTLS, Tls::Up, _) => refuse(out, option, rep::ERR_INVALID, "TLS is up already"),
            (option::STARTTLS, Tls::Off, _) => refuse(out, option, rep::ERR_POLICY, "no TLS here"),
            (option::STRUCTURED_REPLY, _, Framing::Extended) => {
                refuse(out, option, rep::ERR_EXT_HEADER_REQD, "extended headers are agreed already");
            }
            (option::STRUCTURED_REPLY, ..) => {
                self.framing = Framing::Structured;
                reply(out, option, rep::ACK, &[]);
            }
            _ => {
                self.framing = Framing::Extended;
                reply(out, option, rep::ACK, &[]);
            }
        }
        Event::Continue
    }

    fn export_name(
        &mut self,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<Event, NegotiationError> {
        let refused = NegotiationError::ExportName;
        let name = std::str::from_utf8(data).map_err(|_| refused("the name is not UTF-8"))?;
        let export = exports.open(name).ok_or(refused("there is no such export"))?;
        out.extend_from_slice(&export.disk.size_bytes().to_be_bytes());
        out.extend_from_slice(&export.transmission_flags(self.framing).to_be_bytes());
        if self.client_flags.unwrap_or(0) & u32::from(FLAG_NO_ZEROES) == 0 {
            out.resize(out.len() + EXPORT_NAME_PADDING, 0);
        }
        Ok(Event::Transmission(self.session(name, export)))
    }

    fn info_or_go(&mut self, option: u32, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Event {
        let Some(choice) = Choice::parse(data) else {
            refuse(out, option, rep::ERR_INVALID, "the data of this option is malformed");
            return Event::Continue;
        };
        let Some(export) = exports.open(choice.name) else {
            refuse(out, option, rep::ERR_UNKNOWN, "there is no such export");
            return Event::Continue;
        };
        let mut item = info::EXPORT.to_be_bytes().to_vec();
        item.extend_from_slice(&export.disk.size_bytes().to_be_bytes());
        item.extend_from_slice(&export.transmission_flags(self.framing).to_be_bytes());
        reply(out, option, rep::INFO, &item);
        if choice.wants.contains(&info::NAME) {
            reply(out, option, rep::INFO, &[&info::NAME.to_be_bytes(), choice.name.as_bytes()].concat());
        }
        if choice.wants.contains(&info::DESCRIPTION) && !export.description.is_empty() {
            let description = cut(&export.description).as_bytes();
            reply(out, option, rep::INFO, &[&info::DESCRIPTION.to_be_bytes(), description].concat());
        }
        // Told unasked too: these are hints that bind nobody, as every size down to 1 is served.
        let mut item = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for bytes in [1, export.preferred_bytes(), REQUEST_BYTES_MAX as u32] {
            item.extend_from_slice(&bytes.to_be_bytes());
        }
        reply(out, option, rep::INFO, &item);
        reply(out, option, rep::ACK, &[]);
        if option == option::GO {
            Event::Transmission(self.session(choice.name, export))
        } else {
            Event::Continue
        }
    }

    /// Contexts count only for the export that they were selected for.
    fn session(&self, name: &str, export: Export) -> Session {
        let selected = self.context_export.as_deref() == Some(name);
        let contexts = if selected { Contexts::Allocation } else { Contexts::None };
        Session { export, framing: self.framing, contexts }
    }

    fn meta_contexts(&mut self, option: u32, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) {
        if self.framing == Framing::Simple {
            return refuse(out, option, rep::ERR_INVALID, "structured replies come first");
        }
        let Some((name, matches)) = parse_queries(option, data) else {
            return refuse(out, option, rep::ERR_INVALID, "the data of this option is malformed");
        };
        if exports.open(name).is_none() {
            return refuse(out, option, rep::ERR_UNKNOWN, "there is no such export");
        }
        if matches {
            let (id, set) = match option {
                option::SET_META_CONTEXT => (ALLOCATION_CONTEXT, true),
                _ => (0, false),
            };
            if set {
                self.context_export = Some(name.to_owned());
            }
            reply(out, option, rep::META_CONTEXT, &[&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()].concat());
        }
        reply(out, option, rep::ACK, &[]);
    }
}

impl<'a> Choice<'a> {
    fn parse(data: &'a [u8]) -> Option<Choice<'a>> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = fields.u16()?;
        // No allocation by the count: the list grows with the data that is really there.
        let wants = (0..count).map_while(|_| fields.u16()).collect::<Vec<_>>();
        (wants.len() == usize::from(count) && fields.is_empty()).then_some(Choice { name, wants })
    }
}

/// The export's name, and whether a query means `base:allocation`. When listing, no query at all and the
/// bare namespace mean it too.
fn parse_queries(option: u32, data: &[u8]) -> Option<(&str, bool)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    let listing = option == option::LIST_META_CONTEXT;
    let mut matches = listing && count == 0;
    for _ in 0..count {
        let query = fields.string()?;
        matches |= query == BASE_ALLOCATION || (listing && query == "base:");
    }
    fields.is_empty().then_some((name, matches))
}

fn list(exports: &dyn Exports, out: &mut Vec<u8>) {
    for listing in exports.list() {
        let name = cut(&listing.name);
        let mut item = (name.len() as u32).to_be_bytes().to_vec();
        item.extend_from_slice(name.as_bytes());
        item.extend_from_slice(cut(&listing.description).as_bytes());
        reply(out, option::LIST, rep::SERVER, &item);
    }
    reply(out, option::LIST, rep::ACK, &[]);
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(STRING_BYTES_MAX)]
}

fn refuse(out: &mut Vec<u8>, option: u32, kind: u32, message: &str) {
    reply(out, option, kind, message.as_bytes());
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}
