pub(crate) struct Ready;
pub(crate) struct ReadyError;
