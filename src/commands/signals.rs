//! SIGINT and SIGTERM: the first asks, the second does not wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use alluvium_protocol::{Error, Result};
use tokio_util::sync::CancellationToken;

use crate::printer::Exit;

/// Cancels `asked` at the first signal; the second one ends the process at once. The flag says
/// whether there was one.
pub(crate) fn on_signals(asked: CancellationToken) -> Result<Arc<AtomicBool>> {
    use tokio::signal::unix::{SignalKind, signal};
    let was_interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&was_interrupted);
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::internal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::internal)?;
    tokio::spawn(async move {
        for is_second in [false, true] {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if is_second {
                std::process::exit(Exit::Interrupted as i32);
            }
            flag.store(true, Ordering::SeqCst);
            asked.cancel();
        }
    });
    Ok(was_interrupted)
}
