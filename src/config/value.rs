//! Values as people write them: durations, sizes, `${ENV}` and `file:PATH`.

use std::path::Path;
use std::time::Duration;

/// Reads `1500ms`, `60s`, `5m`, `12h`, `7d`.
pub(crate) fn duration_of(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..digits].parse().ok()?;
    let seconds = match &text[digits..] {
        "ms" => return Some(Duration::from_millis(number)),
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    Some(Duration::from_secs(number.checked_mul(seconds)?))
}

/// Reads `100B`, `64KiB`, `128MiB`, `2GiB` (and `KB`, `MB`, `GB` as powers of ten).
pub(crate) fn bytes_of(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..digits].parse().ok()?;
    let factor = match text[digits..].trim() {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return None,
    };
    number.checked_mul(factor).filter(|bytes| *bytes > 0)
}

/// Reads `5%`, `0.5%` as a share from 0 to 1.
pub(crate) fn share_of(text: &str) -> Option<f64> {
    let number: f64 = text.strip_suffix('%')?.trim().parse().ok()?;
    (0.0..=100.0).contains(&number).then_some(number / 100.0)
}

/// A share that may be more than a whole, in hundredths of a percent: `50%`, `300%`.
pub(crate) fn ratio_of(text: &str) -> Option<u64> {
    let number: f64 = text.strip_suffix('%')?.trim().parse().ok()?;
    (0.0..=1_000_000.0).contains(&number).then(|| (number * 100.0).round() as u64)
}

/// Puts environment variables and files into a text. Err: what is missing.
pub(crate) fn expand(text: &str, base: &Path) -> Result<String, String> {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        let Some(length) = rest[start..].find('}') else {
            return Err(format!("{text:?} opens ${{ and does not close it"));
        };
        let name = &rest[start + 2..start + length];
        let value = std::env::var(name)
            .map_err(|_| format!("the environment variable {name} is not set"))?;
        expanded.push_str(&rest[..start]);
        expanded.push_str(&value);
        rest = &rest[start + length + 1..];
    }
    expanded.push_str(rest);
    match expanded.strip_prefix("file:") {
        Some(path) if !path.starts_with("//") => {
            let path = base.join(path);
            let body = std::fs::read_to_string(&path)
                .map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
            Ok(body.trim_end().to_owned())
        }
        _ => Ok(expanded),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_need_their_unit() {
        assert_eq!(duration_of("60s"), Some(Duration::from_secs(60)));
        assert_eq!(duration_of("7d"), Some(Duration::from_secs(604_800)));
        assert_eq!(duration_of("1500ms"), Some(Duration::from_millis(1500)));
        assert_eq!(bytes_of("2GiB"), Some(2 << 30));
        for bad in ["", "60", "s", "-1s", "1 s", "1w", "1.5h", "99999999999999999999s"] {
            assert_eq!(duration_of(bad), None, "{bad}");
        }
        for bad in ["", "64", "64k", "0B", "-1MiB"] {
            assert_eq!(bytes_of(bad), None, "{bad}");
        }
    }

    #[test]
    fn variables_and_files_are_put_in() {
        let base = Path::new("/nowhere");
        assert_eq!(expand("plain", base), Ok("plain".to_owned()));
        assert_eq!(expand("file:///a/b", base), Ok("file:///a/b".to_owned()));
        assert!(expand("${ALLUVIUM_NO_SUCH}", base).unwrap_err().contains("ALLUVIUM_NO_SUCH"));
        assert!(expand("${open", base).is_err());
        assert!(expand("file:secret", base).unwrap_err().contains("/nowhere/secret"));
    }
}
